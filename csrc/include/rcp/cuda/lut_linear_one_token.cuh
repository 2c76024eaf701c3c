// lut_linear for one token, act_bits 4 and 8.
//
// A block takes the row tiles and units of GemvBlock. Warp w takes the units unit_begin + w, + gemv_warps, ... and goes
// with each of them through all row tiles. A step is one unit of one row tile. The sums of a warp and a row tile wait
// in shared memory while the warp is at other row tiles, so the row tiles of a block are a number of the launch, from
// one on.
#pragma once

#include "rcp/cuda/lut_linear_finish.cuh"
#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/split_sum.cuh"

namespace rcp::cuda {
namespace one_token {

// Words of a row tile's sums of a warp: each lane index q holds its own sum of 16 rows.
inline constexpr int sum_words = 64;

// A warp's steps. Two parts are in registers: one is multiplied while the other is on its way.
template <int BITS, int GROUP>
class Steps {
  using PartType = fragments::Part<BITS, GROUP>;
  static constexpr int parts = PartType::parts;
  static_assert(parts == 1 || parts % 2 == 0, "two buffers in turn");

 public:
  __device__ __forceinline__ Steps(const LutLinearParameters& parameters, const GemvBlock& block)
      : p_(parameters), block_(block), unit_(block.unit_begin + block.warp), load_unit_(unit_) {
    load_at_ = p_.call.weight + (sizeof(WeightHeader) + static_cast<int64_t>(block.tile_begin) * p_.tile_bytes) +
               static_cast<unsigned>(load_unit_ * PartType::unit_bytes + block.lane * 16);
    // Opaque to the compiler, which would otherwise compute it again for every use.
    asm("" : "+l"(load_at_));
  }

  // Starts the loads of the first two parts. Those of the second follow those of all warps' first: memory serves them
  // in about this order, and no warp is left with two parts when the last bytes arrive.
  __device__ __forceinline__ void start() {
    load(buffer_[0], 0);
    __syncthreads();
    load(buffer_[1], 1 % parts);
  }

  // fetch(unit, activation) gets the B fragments of a unit, zeros for its missing sub-blocks. `sums` are the warp's,
  // [row tile][sum_words].
  template <class Fetch>
  __device__ __forceinline__ void run(const Fetch& fetch, int* sums) {
    if (unit_ >= block_.unit_end) return;
#pragma unroll 1
    while (true) {
      multiply<0>(fetch, sums);
      if (ends_step<0> && unit_ >= block_.unit_end) return;
      multiply<1>(fetch, sums);
      if constexpr (parts > 2) {
        multiply<2>(fetch, sums);
        multiply<3>(fetch, sums);
      }
      if (unit_ >= block_.unit_end) return;
    }
  }

 private:
  template <int I>
  static constexpr bool ends_step = I % parts == parts - 1;

  // Multiplies part I of the step, or the only part of this step and of the next, and loads what comes two parts later.
  template <int I, class Fetch>
  __device__ __forceinline__ void multiply(const Fetch& fetch, int* sums) {
    constexpr int part = I % parts;
    int* at = sums + tile_ * sum_words + block_.lane;
    if constexpr (part == 0) {
      if (tile_ == 0) fetch(unit_, activation_);
      sum_.clear();
      if (unit_ != block_.unit_begin + block_.warp) sum_.bits[0] = at[0], sum_.bits[1] = at[32];
    }
    sum_.template add<BITS>(buffer_[I % 2], activation_ + part * PartType::sub_blocks, block_.lane);
    load(buffer_[I % 2], (part + 2) % parts);
    if constexpr (ends_step<I>) {
      at[0] = sum_.bits[0];
      at[32] = sum_.bits[1];
      if (++tile_ == block_.tiles) {
        tile_ = 0;
        unit_ += gemv_warps;
      }
    }
  }

  // Loads a part of the step that is next to be loaded, if there is one.
  __device__ __forceinline__ void load(PartType& buffer, int part) {
    if (load_unit_ >= block_.unit_end) return;
    const uint8_t* tables_at = load_at_ + ((block_.lane >> 2) - block_.lane) * 16;
    const int n = load_unit_ == p_.units - 1 ? p_.tail_sub_blocks : unit_sub_blocks;
    if (n == unit_sub_blocks) {
      buffer.template load<false>(load_at_, tables_at + unit_layout<BITS, GROUP>().table_area(n), part, n);
    } else if (part * PartType::sub_blocks < n) {
      buffer.template load<true>(load_at_, tables_at + unit_layout<BITS, GROUP>().table_area(n), part, n);
    } else {
      // The part does not exist, and is added with activations of zero. Another part's scale could be NaN.
#pragma unroll
      for (uint4& scale : buffer.scales) scale = {0, 0, 0, 0};
    }
    if (part < parts - 1) return;
    if (++load_tile_ < block_.tiles) {
      load_at_ += p_.tile_bytes;
    } else {
      load_tile_ = 0;
      load_unit_ += gemv_warps;
      load_at_ += gemv_warps * PartType::unit_bytes - static_cast<int64_t>(block_.tiles - 1) * p_.tile_bytes;
    }
  }

  const LutLinearParameters& p_;
  const GemvBlock& block_;
  int unit_, tile_ = 0;  // of the step that is next to be multiplied
  int load_unit_, load_tile_ = 0;
  const uint8_t* load_at_;  // of this lane's codes
  PartType buffer_[2];
  uint32_t activation_[unit_sub_blocks][1][8];
  fragments::OneTokenSums<GROUP> sum_;
};

// Gets the B fragments of a unit from its quantized columns, for the lane's column of B.
template <int BITS, int GROUP>
__device__ __forceinline__ void fetch_activation(const uint8_t* columns, const uint4* zeros, int lane,
                                                 uint32_t (&activation)[unit_sub_blocks][1][8]) {
  using PartType = fragments::Part<BITS, GROUP>;
  constexpr int steps = PartType::steps_per_slot;
  const uint8_t* at = columns + (lane & 3) * 32;
#pragma unroll
  for (int first = 0; first < 4 * unit_sub_blocks; first += steps) {
    const int slot = first / steps % PartType::slots;
    const bool mine = fragments::OneTokenSums<GROUP>::has_column(slot, PartType::slots, lane);
    const uint8_t* from = mine ? at + first / 4 * 128 + first % 4 * 8 : reinterpret_cast<const uint8_t*>(zeros);
#pragma unroll
    for (int step = 0; step < steps; step += 2) {
      uint32_t* to = &activation[first / 4][0][(first % 4 + step) * 2];
      if constexpr (steps > 1) {
        const uint4 four = *reinterpret_cast<const uint4*>(from + step * 8);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        to[0] = two.x, to[1] = two.y;
      }
    }
  }
}

// Adds the warps' sums [warp][row tile][sum_words], then those of the splits, and stores y. A thread has one output.
template <int GROUP>
__device__ __forceinline__ void finish(const LutLinearParameters& p, const GemvBlock& block, const int* sums,
                                       const RowTerms& terms, float scale) {
  static_assert(one_token_most_row_tiles * tile_rows <= 32 * gemv_warps);
  const int count = block.tiles * tile_rows, warps = block.unit_end - block.unit_begin, i = threadIdx.x;
  const auto add = [](int a, int b) { return fragments::add_sums<GROUP>(a, b); };
  int sum = 0;
  if (i < count) {
    // All loads before the first addition: one latency, not eight.
    int4 of_warp[gemv_warps];
#pragma unroll
    for (int warp = 0; warp < gemv_warps; ++warp) {
      if (warp < warps) of_warp[warp] = reinterpret_cast<const int4*>(sums)[warp * count + i];
    }
#pragma unroll
    for (int warp = 0; warp < gemv_warps; ++warp) {
      const int4 four = of_warp[warp];
      const int next = add(add(four.x, four.y), add(four.z, four.w));
      if (warp < warps) sum = warp == 0 ? next : add(sum, next);
    }
  }
  if (p.splits > 1) {
    const int64_t stride = static_cast<int64_t>(p.row_tiles) * tile_rows;
    int* split_sums = p.split_sums + block.tile_begin * tile_rows + i;
    if (i < count) __stcg(split_sums + blockIdx.y * stride, sum);
    if (!arrives_last(p.call.counters + blockIdx.x) || i >= count) return;
    sum = __ldcg(split_sums);
#pragma unroll 4
    for (int split = 1; split < p.splits; ++split) sum = add(sum, __ldcg(split_sums + split * stride));
  }
  if (i < count) store_output<GROUP>(p, block.tile_begin * tile_rows + i, terms, 0, sum, scale);
}

}  // namespace one_token

// Every block quantizes the token for itself: it takes the maximum of the whole token, and rounds the columns of its
// split. Dynamic shared memory: sums [warp][row tile][64], then the quantized columns.
template <int BITS, int GROUP>
__global__ void __launch_bounds__(32 * gemv_warps, one_token_blocks(BITS, GROUP))
    lut_linear_one_token(const LutLinearParameters parameters) {
  const LutLinearParameters p = parameters;  // a reference to the parameters themselves would be a generic address
  extern __shared__ uint4 shared[];
  __shared__ uint4 zeros[2], warp_values[2];
  constexpr int unit_chunks = unit_columns / chunk_columns;
  GemvBlock block(p, p.block_tiles);
  asm("" : "+r"(block.lane));  // kept in a register, not computed again
  int* sums = reinterpret_cast<int*>(shared);
  auto* bytes = reinterpret_cast<uint8_t*>(sums + gemv_warps * block.tiles * one_token::sum_words);
  one_token::Steps<BITS, GROUP> steps(p, block);

  // All warps load the token before any warp loads weights, because every result waits for the token. In a simulation
  // with cold caches this order was 8 to 17 % faster than weights first. Where the launch may begin before the previous
  // one has ended, weights, which no launch writes, come first instead: they arrive while the token is being made.
  if constexpr (ptx::early_launch) {
    steps.start();
    ptx::wait_for_previous_launch();
  }
  // Two kept chunks a thread are 4096 columns.
  TokenReader<2> token(p.call.x, p.call.x_type, p.call.columns, block.unit_begin * unit_chunks, p.units * unit_chunks,
                       0);
  if (threadIdx.x < 2) zeros[threadIdx.x] = {0, 0, 0, 0};
  if constexpr (ptx::early_launch) {
    ptx::allow_next_launch();
  } else {
    __syncthreads();
    steps.start();
  }
  const uint4 header = ptx::load_vector(p.call.weight);
  // Loaded now: at the end it would be one more latency.
  RowTerms terms{0.0f, 0.0f};
  if (static_cast<int>(threadIdx.x) < block.tiles * tile_rows) {
    terms = load_row_terms<BITS, GROUP>(p, block.tile_begin * tile_rows + threadIdx.x);
  }
  const TokenScale scale = token_scale(token.amax(warp_values), p.call.clip, p.qmax, p.qmax_inverse);
  const int chunks = (block.unit_end - block.unit_begin) * unit_chunks;
  token.visit(chunks, [&](int chunk, const float (&values)[chunk_columns]) {
    const auto index = static_cast<unsigned>(chunk);  // cheaper to divide
    const auto at = unit_layout<BITS, GROUP>().fragment_place(index % 16 * chunk_columns);
    *reinterpret_cast<uint2*>(bytes + index / 16 * sub_block_columns + at.q * 32 + at.step * 8) =
        quantize_chunk(values, scale.reciprocal, p.call.clip < 1.0f, p.qmax);
  });
  __syncthreads();

  steps.run(
      [&](int unit, uint32_t (&activation)[unit_sub_blocks][1][8]) {
        one_token::fetch_activation<BITS, GROUP>(bytes + (unit - block.unit_begin) * unit_columns, zeros, block.lane,
                                                 activation);
      },
      sums + block.warp * block.tiles * one_token::sum_words);
  __syncthreads();
  one_token::finish<GROUP>(p, block, sums, terms, __fmul_rn(scale.scale, header_tensor_scale(header, p.shape_hash)));
}

}  // namespace rcp::cuda
