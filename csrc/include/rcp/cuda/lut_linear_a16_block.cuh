// The thread block of the kernels of lut_linear_a16.cuh: its stream of weights through shared memory, the decoding of a
// unit, its loop over the units, and its output.
#pragma once

#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/lut_linear_plan.h"
#include "rcp/cuda/split_sum.cuh"
#include "rcp/cuda/weight_header.cuh"

namespace rcp::cuda::a16 {

// A unit in shared memory. GROUP is 32, 64 or 128; a larger group counts as groups of 128.
template <int BITS, int GROUP>
struct SharedUnit {
  static constexpr int levels = 1 << BITS, words = 2 * BITS;  // code words of a lane in a sub-block
  static constexpr int sub_block_slots = sub_block_columns / GROUP, steps = GROUP / 32;  // k-steps of a slot
  static constexpr int bytes = unit_layout<BITS, GROUP>().unit_bytes();

  const uint8_t* unit;
  int n, gr, lane;  // n: sub-blocks of the unit

  // Code words of a sub-block. Three bits take 1.5 vectors; `vectors` keeps the half that an odd sub-block shares with
  // the one before it (8-byte loads would have bank conflicts).
  __device__ __forceinline__ void load_codes(int sub_block, uint32_t (&vectors)[12], uint32_t (&code)[words]) const {
    const auto load = [&](int index, int at) {
      const uint4 four = *reinterpret_cast<const uint4*>(unit + 512 * index + 16 * lane);
      vectors[at] = four.x, vectors[at + 1] = four.y, vectors[at + 2] = four.z, vectors[at + 3] = four.w;
    };
    int first = 0;
    if constexpr (BITS == 3) {
      if (sub_block % 2 == 0) {
        load(3 * (sub_block / 2), 0);
        load(3 * (sub_block / 2) + 1, 4);
      } else {
        load(3 * (sub_block / 2) + 2, 8);
        first = 6;
      }
    } else {
#pragma unroll
      for (int c = 0; c < BITS / 2; ++c) load(BITS / 2 * sub_block + c, 4 * c);
    }
#pragma unroll
    for (int w = 0; w < words; ++w) code[w] = vectors[first + w];
  }

  // The table of a row in a slot, with the bits of `flip` flipped in each byte.
  __device__ __forceinline__ fragments::Table<BITS> load_table(int row, int slot, uint32_t flip) const {
    const auto layout = unit_layout<BITS, GROUP>();
    const uint8_t* from = unit + layout.table_area(n) + layout.table_offset(row, slot, 0);
    fragments::Table<BITS> table;
    if constexpr (BITS == 2) {
      table.levels[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (BITS == 3) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      table.levels[0] = two.x, table.levels[1] = two.y;
    } else {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      table.levels[0] = four.x, table.levels[1] = four.y, table.levels[2] = four.z, table.levels[3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < levels / 4; ++i) table.levels[i] ^= flip;
    return table;
  }

  // Scales of 4 slots from `slot`: [row gr, row gr + 8][slot].
  __device__ __forceinline__ void load_scales(int slot, float (&scale)[2][4]) const {
    const auto layout = unit_layout<BITS, GROUP>();
    const uint4 raw = *reinterpret_cast<const uint4*>(unit + layout.scale_area(n) + layout.scale_offset(gr, slot));
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
      scale[i / 2][i % 2 * 2] = two.x, scale[i / 2][i % 2 * 2 + 1] = two.y;
    }
  }

  // f(s, first, a, scale) for each slot: sub-block s, its k-steps first .. first + steps - 1, the A fragments
  // a[k-step][4] of the sub-block with `flip`, and the scales of rows gr and gr + 8.
  template <class F>
  __device__ __forceinline__ void visit_slots(uint32_t flip, const F& f) const {
    float scale[2][4];
    uint32_t vectors[12], code[words];
#pragma unroll
    for (int s = 0; s < unit_sub_blocks; ++s) {
      if (s >= n) break;
      load_codes(s, vectors, code);
      fragments::Table<BITS> tables[sub_block_slots][2];
#pragma unroll
      for (int i = 0; i < 2 * sub_block_slots; ++i) {
        tables[i / 2][i % 2] = load_table(gr + i % 2 * 8, s * sub_block_slots + i / 2, flip);
      }
      uint32_t a[4][4];
      fragments::expand<BITS>([&](int i) { return code[i]; }, [&](int step, int r) { return tables[step / steps][r]; },
                              a);
#pragma unroll
      for (int i = 0; i < sub_block_slots; ++i) {
        const int slot = s * sub_block_slots + i;
        if (slot % 4 == 0) load_scales(slot, scale);
        const float of_rows[2] = {scale[0][slot % 4], scale[1][slot % 4]};
        f(s, i * steps, a, of_rows);
      }
    }
  }
};

// A thread block. Its shared memory is [warp][2 units] of weights, then x of a stage and the factors of a stage. TOKENS
// is the most tokens it takes, TOKEN_BYTES the bytes of x of one token in a unit.
template <int BITS, int GROUP, int TOKENS, int TOKEN_BYTES>
struct Block {
  using Unit = SharedUnit<BITS, GROUP>;
  static constexpr int x_bytes = TOKENS * TOKEN_BYTES;

  const LutLinearParameters p;  // a copy, which the compiler takes apart
  const int lane, first_unit, last_unit;
  const int64_t row_tile, first_token;
  const int tokens;
  const bool active;
  uint8_t *ring, *staged;
  float* factors;
  // The next unit to copy, its address (this lane's share), and whether it goes to the second half of the ring.
  int fetched;
  const uint8_t* from;
  bool flip = false;

  __device__ __forceinline__ Block(const LutLinearParameters& parameters, uint8_t* shared)
      : p(parameters),
        lane(threadIdx.x % 32),
        first_unit(blockIdx.y * p.units_per_split),
        last_unit(min(first_unit + p.units_per_split, p.units)),
        row_tile(static_cast<int64_t>(blockIdx.x % p.row_blocks) * (blockDim.x / 32) + threadIdx.x / 32),
        first_token(static_cast<int64_t>(blockIdx.x / p.row_blocks) * TOKENS),
        tokens(static_cast<int>(min(p.call.tokens - first_token, static_cast<int64_t>(TOKENS)))),
        active(row_tile < p.row_tiles),
        ring(shared + threadIdx.x / 32 * (2 * Unit::bytes)),
        staged(shared + blockDim.x / 32 * (2 * Unit::bytes)),
        factors(reinterpret_cast<float*>(staged + p.units_per_stage * x_bytes)),
        fetched(first_unit),
        from(p.call.weight + sizeof(WeightHeader) + row_tile * p.tile_bytes +
             static_cast<int64_t>(first_unit) * Unit::bytes + lane * 16) {}

  __device__ __forceinline__ int sub_blocks(int unit) const {
    return unit == p.units - 1 ? p.tail_sub_blocks : unit_sub_blocks;
  }
  // Starts the copy of the next unit, if the block has one more. Always one commit, which copy_wait counts.
  __device__ __forceinline__ void fetch() {
    if (active && fetched < last_unit) {
      uint8_t* to = ring + (flip ? Unit::bytes : 0) + lane * 16;
      // The same instructions copy a short last unit, each lane as far as the unit goes.
      const int bytes = unit_layout<BITS, GROUP>().unit_bytes(sub_blocks(fetched));
      if (bytes == Unit::bytes) {
#pragma unroll
        for (int at = 0; at < Unit::bytes; at += 512) {
          if (at + 512 <= Unit::bytes || lane * 16 < Unit::bytes - at) ptx::copy_async(to + at, from + at);
        }
      } else {
#pragma unroll 1
        for (int at = 0; at + lane * 16 < bytes; at += 512) ptx::copy_async(to + at, from + at);
      }
    }
    ptx::copy_commit();
    from += Unit::bytes;
    flip = !flip;
    ++fetched;
  }

  // The loop over the units of the block's split. A warp calls stage(raw, token, x) for each token of a unit of x. Its
  // lanes hold 16 of the 512 columns each: chunks c = 0, 1 of sub-block lane / 8 and k-steps 2i + c, with i = lane / 4
  // % 2 and q = lane % 4. stage stores them in the unit's x and returns the token's factor. Then each active warp calls
  // multiply(unit, x, factors).
  template <class Stage, class Multiply>
  __device__ __forceinline__ void run(const Stage& stage, const Multiply& multiply) {
    fetch();
    fetch();
    for (int begin = first_unit; begin < last_unit; begin += p.units_per_stage) {
      const int units = min(p.units_per_stage, last_unit - begin);
      if (begin != first_unit) __syncthreads();
      for (int task = threadIdx.x / 32; task < units * TOKENS; task += blockDim.x / 32) {
        const int unit = task / TOKENS, token = task % TOKENS;
        float factor = 0.0f;
        if (token < tokens) {
          const int64_t size = p.call.x_type == FloatType::float32 ? 4 : 2;
          const char* x = static_cast<const char*>(p.call.x) + (first_token + token) * p.call.columns * size;
          RawChunk raw[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = unit_layout<BITS, GROUP>().fragment_column({lane / 4 % 2 * 2 + c, lane % 4, 0, 0});
            const int64_t first = static_cast<int64_t>(begin + unit) * unit_columns + lane / 8 * sub_block_columns;
            raw[c] = load_chunk(x, p.call.x_type, first + column, p.call.columns);
          }
          factor = stage(raw, token, staged + unit * x_bytes);
        }
        if (lane == 0) factors[unit * TOKENS + token] = factor;
      }
      __syncthreads();
      if (!active) continue;
      for (int unit = 0; unit < units; ++unit) {
        ptx::copy_wait<1>();
        __syncwarp();
        // The half of the ring with the older of two copied units is where the next unit goes.
        multiply(Unit{ring + (flip ? Unit::bytes : 0), sub_blocks(begin + unit), lane / 4, lane},
                 staged + unit * x_bytes, factors + unit * TOKENS);
        __syncwarp();
        fetch();
      }
    }
  }

  // Adds the sums of the splits, a value at a time. True in the threads that then hold the sums.
  template <int N>
  __device__ __forceinline__ bool sum_splits(float (&values)[N]) const {
    if (p.splits == 1) return true;
    auto* sums = reinterpret_cast<float*>(p.split_sums);
    const auto place = [&](int split, int i) {
      return sums + ((static_cast<int64_t>(blockIdx.x) * p.splits + split) * N + i) * blockDim.x + threadIdx.x;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) __stcg(place(blockIdx.y, i), values[i]);
    if (!arrives_last(p.call.counters + blockIdx.x)) return false;
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = 0.0f;
    for (int split = 0; split < p.splits; ++split) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = __fadd_rn(values[i], __ldcg(place(split, i)));
    }
    return true;
  }

  __device__ __forceinline__ float tensor_scale() const {
    return header_tensor_scale(p.call.weight, {p.call.rows, p.call.columns, p.call.group_size, BITS});
  }
  // Output (token, row) of the block: row 0..15 of the warp's row tile.
  __device__ __forceinline__ void store(int token, int row, float sum, float scale) const {
    const int64_t m = first_token + token, n = row_tile * tile_rows + row;
    if (m >= p.call.tokens || n >= p.call.rows) return;
    const float bias = p.call.bias == nullptr ? 0.0f : load_value(p.call.bias, p.call.bias_type, n);
    store_value(p.call.y, p.call.x_type, m * p.call.rows + n, __fmaf_rn(sum, scale, bias));
  }
};

}  // namespace rcp::cuda::a16
