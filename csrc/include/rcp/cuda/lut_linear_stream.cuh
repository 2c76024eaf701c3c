// The main loop of the GEMV kernels (1 to 16 tokens) and its sums.
//
// A block takes ROW_TILES row tiles and the units [unit_begin, unit_end) of their columns. Warp w takes the units
// unit_begin + w, + gemv_warps, ... of all its row tiles: it fetches a unit's activations once and keeps them in
// registers while the row tiles pass. The block adds the sums of its warps in order, and split_sum.cuh those of splits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/lut_linear_plan.h"
#include "rcp/cuda/split_sum.cuh"
#include "rcp/cuda/weight_header.cuh"

namespace rcp::cuda {
namespace stream {

using fragments::OneTokenSums;
using fragments::Part;
using fragments::Sums;

// TOKEN_TILES 0: one token.
template <int BITS, int GROUP, int TOKEN_TILES, int ROW_TILES>
struct Stream {
  using PartType = Part<BITS, GROUP>;
  // The parts of a unit over all row tiles; part i is part i % parts of row tile i / parts.
  static constexpr int parts = PartType::parts, all_parts = ROW_TILES * parts;
  static_assert(all_parts % 2 == 0, "two buffers in turn");
  // The loop without checks is compiled where it matters most: a group size of 128 and at most 8 tokens. Elsewhere the
  // copy would cost compile time, and more registers than there are.
  static constexpr bool always_checked = GROUP != 128 || BITS == 4 || TOKEN_TILES > 1;
  // With one token, where instructions count most, a warp's last unit has its own loop body, without prefetch.
  static constexpr bool one_loop = TOKEN_TILES > 0;
  static constexpr int token_tiles = TOKEN_TILES == 0 ? 1 : TOKEN_TILES;
  using SumsType = std::conditional_t<TOKEN_TILES == 0, OneTokenSums<GROUP>, Sums<GROUP, token_tiles>>;
  // Words of a row tile's sums in shared memory, and words of one output. With one
  // token, each lane index q holds its own sum.
  static constexpr int sum_words = TOKEN_TILES == 0 ? 64 : 128 * TOKEN_TILES, output_words = TOKEN_TILES == 0 ? 4 : 1;

  const LutLinearParameters& p;
  int lane, warp, tile_begin, unit_begin, unit_end, unit;
  bool checked;  // a row tile or a sub-block may be missing
  const uint8_t *codes_at, *tables_at;
  PartType buffer[2];

  __device__ __forceinline__ explicit Stream(const LutLinearParameters& parameters) : p(parameters) {
    // The shuffle tells the compiler that the warp's index is uniform.
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
    lane = threadIdx.x % 32;
    tile_begin = blockIdx.x * ROW_TILES;
    unit_begin = blockIdx.y * p.units_per_split;
    unit_end = min(unit_begin + p.units_per_split, p.units);
    unit = unit_begin + warp;
    checked = static_cast<int>(blockIdx.x) >= p.whole_blocks;
    const uint8_t* start = p.call.weight + (sizeof(WeightHeader) + static_cast<int64_t>(tile_begin) * p.tile_bytes);
    codes_at = start + static_cast<unsigned>(unit * PartType::unit_bytes + lane * 16);
    tables_at = start + static_cast<unsigned>(unit * PartType::unit_bytes + lane / 4 * 16);
    // Opaque to the compiler, which would otherwise compute them again for every use.
    asm("" : "+l"(codes_at), "+l"(tables_at));
  }

  // Starts the loads of the first two parts.
  __device__ __forceinline__ void start() {
    if (unit >= unit_end) return;
    // Parts beyond the last sub-block are skipped by load() but still added. Their scales are zeroed, because an
    // uninitialised NaN times 0 would be NaN.
    if constexpr (parts > 1) {
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

  __device__ __forceinline__ int tile_count() const { return min(ROW_TILES, p.row_tiles - tile_begin); }

  // Loads part i of a unit into a buffer.
  template <bool CHECKED>
  __device__ __forceinline__ void load(int which, int i, int of_unit, const uint8_t* codes, const uint8_t* tables) {
    const int tile = i / parts, part = i % parts;
    if (one_loop && of_unit >= unit_end) return;
    const int n = CHECKED && of_unit == p.units - 1 ? p.tail_sub_blocks : unit_sub_blocks;
    if (CHECKED && (of_unit >= unit_end || tile >= tile_count() || part * PartType::sub_blocks >= n)) return;
    const int64_t offset = static_cast<int64_t>(tile) * p.tile_bytes;
    buffer[which].template load<CHECKED>(codes + offset, tables + offset + unit_layout<BITS, GROUP>().table_area(n),
                                         part, n);
  }

  // Multiplies one unit of all row tiles. MORE: another unit of the warp follows, and its first two parts are loaded.
  template <bool CHECKED, bool MORE, class Fetch>
  __device__ __forceinline__ void one_unit(const Fetch& fetch, SumsType (&sums)[ROW_TILES]) {
    uint32_t activation[unit_sub_blocks][token_tiles][8];
    fetch(unit, activation);
    constexpr int stride = MORE ? gemv_warps * PartType::unit_bytes : 0;
#pragma unroll
    for (int i = 0; i < all_parts; ++i) {
      const int tile = i / parts, first = i % parts * PartType::sub_blocks;
      if (!CHECKED || tile < tile_count()) {
        sums[tile].template add<BITS>(buffer[i % 2], activation + first, lane);
      }
      if (i + 2 < all_parts) {
        load<CHECKED>(i % 2, i + 2, unit, codes_at, tables_at);
      } else if (MORE) {
        load<CHECKED>(i % 2, i + 2 - all_parts, unit + gemv_warps, codes_at + stride, tables_at + stride);
      }
    }
    if (MORE) {
      unit += gemv_warps;
      codes_at += stride;
      tables_at += stride;
    }
  }

  // fetch(unit, activation) gets the B fragments of a unit, zeros for its missing sub-blocks. Leaves the warp's sums in
  // `shared_sums` [warp][ROW_TILES][sum_words].
  template <bool CHECKED, class Fetch>
  __device__ __forceinline__ void run(const Fetch& fetch, int* shared_sums) {
    SumsType sums[ROW_TILES];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) sums[i].clear();
    if constexpr (CHECKED || one_loop) {
#pragma unroll 1
      do {
        one_unit<CHECKED, true>(fetch, sums);
      } while (unit < unit_end);
    } else {
#pragma unroll 1
      while (unit + gemv_warps < unit_end) one_unit<false, true>(fetch, sums);
      one_unit<false, false>(fetch, sums);
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      int* to = shared_sums + (warp * ROW_TILES + i) * sum_words;
      if constexpr (TOKEN_TILES == 0) {
        to[lane] = sums[i].bits[0];
        to[32 + lane] = sums[i].bits[1];
      } else {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
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

// Stores the output of a row of a row tile and a token, if both exist. `sum` is a value of Sums::bits,
// `scale_of(token)` the token's scale.
template <int BITS, int GROUP, class ScaleOf>
__device__ __forceinline__ void store_output(const LutLinearParameters& p, int tile, int row, int64_t token, int sum,
                                             float tensor_scale, const ScaleOf& scale_of) {
  const int64_t n = static_cast<int64_t>(tile) * tile_rows + row;
  if (n >= p.call.rows || token >= p.call.tokens) return;
  float total = __int_as_float(sum);
  if constexpr (GROUP == 0) {
    // The scale of a row that is one group: slot 0 of the first unit.
    const CudaLayout layout{p.call.rows, p.call.columns, p.call.columns, BITS};
    const uint8_t* first_unit = p.call.weight + layout.unit_offset(tile, 0);
    const auto* scales = reinterpret_cast<const __half*>(first_unit + layout.scale_area(layout.sub_blocks_of(0)));
    total = __fmul_rn(__half2float(__ldg(scales + layout.scale_offset(row, 0) / 2)), static_cast<float>(sum));
  }
  const float bias = p.call.bias == nullptr ? 0.0f : load_value(p.call.bias, p.call.bias_type, n);
  store_value(p.call.y, p.call.x_type, token * p.call.rows + n,
              __fmaf_rn(total, __fmul_rn(scale_of(token), tensor_scale), bias));
}

// Adds the warps' sums, then those of the splits, and stores y.
template <int BITS, int GROUP, int TOKEN_TILES, int ROW_TILES, class ScaleOf>
__device__ __forceinline__ void finish(const Stream<BITS, GROUP, TOKEN_TILES, ROW_TILES>& main_loop, const int* sums,
                                       const uint4& header, const ScaleOf& scale_of) {
  using StreamType = Stream<BITS, GROUP, TOKEN_TILES, ROW_TILES>;
  const LutLinearParameters& p = main_loop.p;
  constexpr int outputs = StreamType::sum_words / StreamType::output_words, threads = 32 * gemv_warps;
  const float tensor_scale = header_tensor_scale(header, p.shape_hash);
  const auto add = [](int a, int b) { return fragments::add_sums<GROUP>(a, b); };
  const auto store = [&](int i, int sum) {
    const int output = i % outputs, lane = output / 4 % 32;
    const int row = TOKEN_TILES == 0 ? output : lane / 4 + output % 4 / 2 * 8;
    const int token = TOKEN_TILES == 0 ? 0 : output / 128 * 8 + lane % 4 * 2 + output % 2;
    store_output<BITS, GROUP>(p, main_loop.tile_begin + i / outputs, row, token, sum, tensor_scale, scale_of);
  };
  __syncthreads();
  const int count = main_loop.tile_count() * outputs;
  const int active_warps = min(gemv_warps, main_loop.unit_end - main_loop.unit_begin);
  const int64_t split_stride = static_cast<int64_t>(p.row_tiles) * outputs;
  int* split_sums = p.split_sums + static_cast<int64_t>(main_loop.tile_begin) * outputs;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += threads) {
    int sum = 0;
    for (int warp = 0; warp < active_warps; ++warp) {
      int of_warp;
      if constexpr (TOKEN_TILES == 0) {
        const int4 four = reinterpret_cast<const int4*>(sums)[warp * ROW_TILES * outputs + i];
        of_warp = add(add(four.x, four.y), add(four.z, four.w));
      } else {
        of_warp = sums[warp * ROW_TILES * outputs + i];
      }
      sum = warp == 0 ? of_warp : add(sum, of_warp);
    }
    if (p.splits == 1) {
      store(i, sum);
    } else {
      __stcg(split_sums + blockIdx.y * split_stride + i, sum);
    }
  }
  if (p.splits == 1 || !arrives_last(p.call.counters + blockIdx.x)) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += threads) {
    int sum = __ldcg(split_sums + i);
    for (int split = 1; split < p.splits; ++split) sum = add(sum, __ldcg(split_sums + split * split_stride + i));
    store(i, sum);
  }
}

}  // namespace stream
}  // namespace rcp::cuda
