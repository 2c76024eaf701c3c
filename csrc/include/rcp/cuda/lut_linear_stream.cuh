// The main loop of the GEMV family (1 to 16 tokens) and its reductions.
//
// A block takes TILES row tiles and the units [unit_begin, unit_end) of their columns; warp w takes the units
// unit_begin + w, + warps, .. of all its tiles, so that a unit's activations are fetched once and stay in registers
// while the tiles pass. The warps' sums are added in their order in shared memory, and with several splits of the
// columns, the last block of a row range to finish adds theirs, in their order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "rcp/cuda/lut_linear_activation.cuh"
#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/weight_header.cuh"
#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda {

inline constexpr int gemv_warps = 8;

// What a GEMV kernel is launched with.
struct GemvProblem {
  const uint8_t* weight;
  uint32_t stamp;  // that the weight must have; else every output is NaN: a kernel cannot raise
  const void* x;
  const void* bias;
  void* y;
  FloatType bias_type, y_type;
  int64_t rows;
  int columns, tile_bytes;
  int row_tiles, units, tail_sub_blocks;  // sub-blocks of the last unit
  int units_per_split, splits;
  int whole_blocks;  // the first blocks along the rows, of which no tile or sub-block is missing
  int tokens;
  float clip, qmax, qmax_inverse;             // one token: quantized by every block for itself
  float qmax_inverse_high, qmax_inverse_low;  // sum: 1 / qmax to 48 bits, the first one rounded up
  const float* token_scales;                  // several tokens: quantized before, [tokens]
  const uint4* fragments;                     // [token tile][sub-block][2][32 lanes]
  int* partial_sums;                          // [split][row tile][words of a tile's sums], if splits > 1
  unsigned* counters;                         // [blocks along the rows], if splits > 1
};

namespace stream {

using fragments::OneTokenSums;
using fragments::Part;
using fragments::Sums;

// NT: tiles of 8 tokens; 0: one token.
template <int BITS, int SLOT, int NT, int TILES>
struct Stream {
  using PartType = Part<BITS, SLOT>;
  static constexpr int warps = gemv_warps, parts = PartType::parts, steps = TILES * parts;
  static_assert(steps % 2 == 0, "two buffers in turn");
  // The loop without checks is compiled where it matters most, for one token in groups of 128: elsewhere the copy would
  // cost compile time, and registers beyond the last.
  static constexpr bool always_checked = SLOT != 128 || BITS == 4 || NT > 1;
  // A warp's last unit is a copy of its own, without the loads for another, where instructions count most.
  static constexpr bool one_loop = NT > 0;
  static __device__ __forceinline__ CudaLayout layout() { return {0, 0, SLOT == 0 ? 512 : SLOT, BITS}; }
  static constexpr int token_tiles = NT == 0 ? 1 : NT;
  using SumsType = std::conditional_t<NT == 0, OneTokenSums<SLOT>, Sums<SLOT, token_tiles>>;
  // Words of a tile's sums in shared memory, and how many of them make one: one token has a sum for each q.
  static constexpr int sum_words = NT == 0 ? 64 : 128 * NT, per_output = NT == 0 ? 4 : 1;

  const GemvProblem& problem;
  int lane, warp, tile_begin, unit_begin, unit_end, unit;
  bool checked;  // some tile or sub-block is missing
  const uint8_t *codes_at, *tables_at;
  PartType buffer[2];

  // Asks for the first two parts.
  __device__ __forceinline__ explicit Stream(const GemvProblem& p) : problem(p) {
    // The shuffle tells the compiler that the warp's index is uniform.
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
    lane = threadIdx.x % 32;
    tile_begin = blockIdx.x * TILES;
    unit_begin = blockIdx.y * p.units_per_split;
    unit_end = min(unit_begin + p.units_per_split, p.units);
    unit = unit_begin + warp;
    checked = static_cast<int>(blockIdx.x) >= p.whole_blocks;
    const uint8_t* start = p.weight + (sizeof(WeightHeader) + static_cast<int64_t>(tile_begin) * p.tile_bytes);
    codes_at = start + static_cast<unsigned>(unit * PartType::unit_bytes + lane * 16);
    tables_at = start + static_cast<unsigned>(unit * PartType::unit_bytes + lane / 4 * 16);
    // Opaque to the compiler, which would otherwise compute them again for every use.
    asm("" : "+l"(codes_at), "+l"(tables_at));
    if (unit >= unit_end) return;
    // A part past the last sub-block is not loaded, but added: its sums are 0, which a scale of NaN would not leave so.
    if constexpr (PartType::parts > 1) {
#pragma unroll
      for (PartType& part : buffer) {
#pragma unroll
        for (uint4& scale : part.scales) scale = {0, 0, 0, 0};
      }
    }
    if (always_checked || checked) {
      load<true>(0, 0, unit, codes_at, tables_at);
      load<true>(1, 1, unit, codes_at, tables_at);
    } else {
      load<false>(0, 0, unit, codes_at, tables_at);
      load<false>(1, 1, unit, codes_at, tables_at);
    }
  }

  __device__ __forceinline__ int tile_count() const { return min(TILES, problem.row_tiles - tile_begin); }

  // Step `step` of a unit (tile step / parts, part step % parts) into a buffer.
  template <bool CHECKED>
  __device__ __forceinline__ void load(int which, int step, int of_unit, const uint8_t* codes, const uint8_t* tables) {
    const int tile = step / parts, part = step % parts;
    if (one_loop && of_unit >= unit_end) return;
    const int n = CHECKED && of_unit == problem.units - 1 ? problem.tail_sub_blocks : unit_sub_blocks;
    if (CHECKED && (of_unit >= unit_end || tile >= tile_count() || part * PartType::sub_blocks >= n)) return;
    const int64_t offset = static_cast<int64_t>(tile) * problem.tile_bytes;
    buffer[which].template load<CHECKED>(codes + offset, tables + offset + layout().table_area(n), part, n);
  }

  // One unit of all tiles; with MORE, another unit of the warp's follows, whose first two parts are asked for.
  template <bool CHECKED, bool MORE, class Fetch>
  __device__ __forceinline__ void one_unit(const Fetch& fetch, SumsType (&sums)[TILES]) {
    uint32_t activation[unit_sub_blocks][token_tiles][8];
    fetch(unit, activation);
    constexpr int stride = MORE ? warps * PartType::unit_bytes : 0;
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      PartType& now = buffer[step % 2];
      const int tile = step / parts, first = step % parts * PartType::sub_blocks;
      if (!CHECKED || tile < tile_count()) {
        sums[tile].template add<BITS>(now, activation + first, lane);
      }
      if (step + 2 < steps) {
        load<CHECKED>(step % 2, step + 2, unit, codes_at, tables_at);
      } else if (MORE) {
        load<CHECKED>(step % 2, step + 2 - steps, unit + warps, codes_at + stride, tables_at + stride);
      }
    }
    if (MORE) {
      unit += warps;
      codes_at += stride;
      tables_at += stride;
    }
  }

  // fetch(unit, activation): the B fragments of a unit, zeros for its missing sub-blocks. Leaves the warp's sums in
  // `shared_sums` [warp][TILES][sum_words].
  template <bool CHECKED, class Fetch>
  __device__ __forceinline__ void run(const Fetch& fetch, int* shared_sums) {
    SumsType sums[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) sums[i].clear();
    if constexpr (CHECKED || one_loop) {
#pragma unroll 1
      do {
        one_unit<CHECKED, true>(fetch, sums);
      } while (unit < unit_end);
    } else {
#pragma unroll 1
      while (unit + warps < unit_end) one_unit<false, true>(fetch, sums);
      one_unit<false, false>(fetch, sums);
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      int* to = shared_sums + (warp * TILES + i) * sum_words;
      if constexpr (NT == 0) {
        to[lane] = sums[i].bits[0];
        to[32 + lane] = sums[i].bits[1];
      } else {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const int (&bits)[4] = sums[i].bits[t];
          reinterpret_cast<int4*>(to)[t * 32 + lane] = {bits[0], bits[1], bits[2], bits[3]};
        }
      }
    }
  }
  template <class Fetch>
  __device__ __forceinline__ void run(const Fetch& fetch, int* shared_sums) {
    if (unit >= unit_end) return;
    if constexpr (always_checked) {
      run<true>(fetch, shared_sums);
    } else if (checked) {
      run<true>(fetch, shared_sums);
    } else {
      run<false>(fetch, shared_sums);
    }
  }
};

// Output e of a tile's: its row in the tile and its token.
template <int NT>
__device__ __forceinline__ void place_of(int e, int& row, int& token) {
  if constexpr (NT == 0) {
    row = e, token = 0;
  } else {
    const int lane = e / 4 % 32;
    row = lane / 4 + e % 4 / 2 * 8, token = e / 128 * 8 + lane % 4 * 2 + e % 2;
  }
}

// The scale of a row that is one group: slot 0 of its first unit.
template <int BITS>
__device__ __forceinline__ float row_scale(const GemvProblem& p, int64_t tile, int row) {
  const CudaLayout layout{p.rows, p.columns, p.columns, BITS};
  const uint8_t* at = p.weight + layout.unit_offset(tile, 0) + layout.scale_area(layout.sub_blocks_of(0));
  return activation::widen<FloatType::float16>(
      __ldg(reinterpret_cast<const uint16_t*>(at + layout.scale_offset(row, 0))));
}

// After the main loop: adds the warps' sums, then the splits', and stores y. `scale_of(token)` is the token's scale.
template <int BITS, int SLOT, int NT, int TILES, class ScaleOf>
__device__ __forceinline__ void finish(const Stream<BITS, SLOT, NT, TILES>& main_loop, const int* sums, int* is_last,
                                       const uint4& header, const ScaleOf& scale_of) {
  using StreamType = Stream<BITS, SLOT, NT, TILES>;
  const GemvProblem& p = main_loop.problem;
  constexpr int outputs = StreamType::sum_words / StreamType::per_output;
  const float tensor_scale = header_tensor_scale(header, p.stamp);
  const auto add = [](int a, int b) { return fragments::add_sums<SLOT>(a, b); };
  const auto store = [&](int e, int sum) {
    int row, token;
    place_of<NT>(e % outputs, row, token);
    const int tile = main_loop.tile_begin + e / outputs;
    const int64_t n = static_cast<int64_t>(tile) * tile_rows + row;
    if (n >= p.rows || token >= p.tokens) return;
    float total = __int_as_float(sum);
    if constexpr (SLOT == 0) total = __fmul_rn(row_scale<BITS>(p, tile, row), static_cast<float>(sum));
    const float bias = p.bias == nullptr ? 0.0f : activation::load_float(p.bias, p.bias_type, n);
    activation::store_float(p.y, p.y_type, token * p.rows + n,
                            __fmaf_rn(total, __fmul_rn(scale_of(token), tensor_scale), bias));
  };
  __syncthreads();
  const int count = main_loop.tile_count() * outputs;
  const int active = min(StreamType::warps, main_loop.unit_end - main_loop.unit_begin);
#pragma unroll 1
  for (int e = threadIdx.x; e < count; e += 32 * StreamType::warps) {
    int sum = 0;
    for (int warp = 0; warp < active; ++warp) {
      int of_warp;
      if constexpr (NT == 0) {
        const int4 four = reinterpret_cast<const int4*>(sums)[warp * TILES * outputs + e];
        of_warp = add(add(four.x, four.y), add(four.z, four.w));
      } else {
        of_warp = sums[warp * TILES * outputs + e];
      }
      sum = warp == 0 ? of_warp : add(sum, of_warp);
    }
    if (p.splits == 1) {
      store(e, sum);
    } else {
      __stcg(p.partial_sums + (static_cast<int64_t>(blockIdx.y) * p.row_tiles + main_loop.tile_begin) * outputs + e,
             sum);
    }
  }
  if (p.splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned before = atomicAdd(p.counters + blockIdx.x, 1u);
    const bool last = before + 1 == static_cast<unsigned>(p.splits);
    if (last) p.counters[blockIdx.x] = 0;
    *is_last = last;
  }
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
#pragma unroll 1
  for (int e = threadIdx.x; e < count; e += 32 * StreamType::warps) {
    const int* at = p.partial_sums + static_cast<int64_t>(main_loop.tile_begin) * outputs + e;
    int sum = __ldcg(at);
    for (int split = 1; split < p.splits; ++split) {
      at += static_cast<int64_t>(p.row_tiles) * outputs;
      sum = add(sum, __ldcg(at));
    }
    store(e, sum);
  }
}

}  // namespace stream
}  // namespace rcp::cuda
