// The main loop of the GEMV kernel for 2 to 16 tokens, and its sums.
//
// A block takes ROW_TILES row tiles and the units of GemvBlock. Warp w takes the units
// unit_begin + w, + gemv_warps, ... of all its row tiles: it fetches a unit's activations once and keeps them in
// registers while the row tiles pass. The block adds the sums of its warps in order, and split_sum.cuh those of splits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "rcp/cuda/lut_linear_finish.cuh"
#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/split_sum.cuh"

namespace rcp::cuda {
namespace stream {

using fragments::Part;
using fragments::Sums;

template <int BITS, int GROUP, int TOKEN_TILES, int ROW_TILES>
struct Stream {
  using PartType = Part<BITS, GROUP>;
  // The parts of a unit over all row tiles; part i is part i % parts of row tile i / parts.
  static constexpr int parts = PartType::parts, all_parts = ROW_TILES * parts;
  static_assert(all_parts % 2 == 0, "two buffers in turn");
  // The loop without checks is compiled where it matters most: a group size of 128 and at most 8 tokens. Elsewhere the
  // copy would cost compile time, and more registers than there are.
  static constexpr bool always_checked = GROUP != 128 || BITS == 4 || TOKEN_TILES > 1;
  using SumsType = Sums<GROUP, TOKEN_TILES>;
  static constexpr int sum_words = 128 * TOKEN_TILES;  // of a row tile in shared memory

  const LutLinearParameters& p;
  const GemvBlock block;
  int unit;
  bool checked;  // a row tile or a sub-block may be missing
  const uint8_t *codes_at, *tables_at;
  PartType buffer[2];

  __device__ __forceinline__ explicit Stream(const LutLinearParameters& parameters)
      : p(parameters), block(parameters, ROW_TILES) {
    unit = block.unit_begin + block.warp;
    checked = static_cast<int>(blockIdx.x) >= p.whole_blocks;
    const uint8_t* start =
        p.call.weight + (sizeof(WeightHeader) + static_cast<int64_t>(block.tile_begin) * p.tile_bytes);
    codes_at = start + static_cast<unsigned>(unit * PartType::unit_bytes + block.lane * 16);
    tables_at = start + static_cast<unsigned>(unit * PartType::unit_bytes + block.lane / 4 * 16);
    // Opaque to the compiler, which would otherwise compute them again for every use.
    asm("" : "+l"(codes_at), "+l"(tables_at));
  }

  // Starts the loads of the first two parts.
  __device__ __forceinline__ void start() {
    if (unit >= block.unit_end) return;
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

  // Loads part i of a unit into a buffer.
  template <bool CHECKED>
  __device__ __forceinline__ void load(int which, int i, int of_unit, const uint8_t* codes, const uint8_t* tables) {
    const int tile = i / parts, part = i % parts;
    if (of_unit >= block.unit_end) return;
    const int n = CHECKED && of_unit == p.units - 1 ? p.tail_sub_blocks : unit_sub_blocks;
    if (CHECKED && (tile >= block.tiles || part * PartType::sub_blocks >= n)) return;
    const int64_t offset = static_cast<int64_t>(tile) * p.tile_bytes;
    buffer[which].template load<CHECKED>(codes + offset, tables + offset + unit_layout<BITS, GROUP>().table_area(n),
                                         part, n);
  }

  // Multiplies one unit of all row tiles, and loads the first two parts of the warp's next unit.
  template <bool CHECKED, class Fetch>
  __device__ __forceinline__ void one_unit(const Fetch& fetch, SumsType (&sums)[ROW_TILES]) {
    uint32_t activation[unit_sub_blocks][TOKEN_TILES][8];
    fetch(unit, activation);
    constexpr int stride = gemv_warps * PartType::unit_bytes;
#pragma unroll
    for (int i = 0; i < all_parts; ++i) {
      const int tile = i / parts, first = i % parts * PartType::sub_blocks;
      if (!CHECKED || tile < block.tiles) {
        sums[tile].template add<BITS>(buffer[i % 2], activation + first, block.lane);
      }
      if (i + 2 < all_parts) {
        load<CHECKED>(i % 2, i + 2, unit, codes_at, tables_at);
      } else {
        load<CHECKED>(i % 2, i + 2 - all_parts, unit + gemv_warps, codes_at + stride, tables_at + stride);
      }
    }
    unit += gemv_warps;
    codes_at += stride;
    tables_at += stride;
  }

  // fetch(unit, activation) gets the B fragments of a unit, zeros for its missing sub-blocks. Leaves the warp's sums in
  // `shared_sums` [warp][ROW_TILES][sum_words].
  template <bool CHECKED, class Fetch>
  __device__ __forceinline__ void run(const Fetch& fetch, int* shared_sums) {
    SumsType sums[ROW_TILES];
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) sums[i].clear();
#pragma unroll 1
    do {
      one_unit<CHECKED>(fetch, sums);
    } while (unit < block.unit_end);
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      auto* to = reinterpret_cast<int4*>(shared_sums + (block.warp * ROW_TILES + i) * sum_words) + block.lane;
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t) {
        const int (&bits)[4] = sums[i].bits[t];
        to[t * 32] = {bits[0], bits[1], bits[2], bits[3]};
      }
    }
  }
  template <class Fetch>
  __device__ __forceinline__ void run(const Fetch& fetch, int* shared_sums) {
    if (unit >= block.unit_end) return;
    if constexpr (always_checked) {
      run<true>(fetch, shared_sums);
    } else if (checked) {
      run<true>(fetch, shared_sums);
    } else {
      run<false>(fetch, shared_sums);
    }
  }
};

// Adds the warps' sums, then those of the splits, and stores y.
template <int BITS, int GROUP, int TOKEN_TILES, int ROW_TILES>
__device__ __forceinline__ void finish(const Stream<BITS, GROUP, TOKEN_TILES, ROW_TILES>& main_loop, const int* sums,
                                       const uint4& header) {
  const LutLinearParameters& p = main_loop.p;
  const GemvBlock& block = main_loop.block;
  constexpr int outputs = 128 * TOKEN_TILES, threads = 32 * gemv_warps;  // of a row tile
  const float tensor_scale = header_tensor_scale(header, p.shape_hash);
  const auto add = [](int a, int b) { return fragments::add_sums<GROUP>(a, b); };
  const auto store = [&](int i, int sum) {
    const int output = i % outputs, lane = output / 4 % 32;
    store_output<BITS, GROUP>(p, block.tile_begin + i / outputs, lane / 4 + output % 4 / 2 * 8,
                              output / 128 * 8 + lane % 4 * 2 + output % 2, sum, tensor_scale);
  };
  __syncthreads();
  const int count = block.tiles * outputs;
  const int active_warps = min(gemv_warps, block.unit_end - block.unit_begin);
  const int64_t split_stride = static_cast<int64_t>(p.row_tiles) * outputs;
  int* split_sums = p.split_sums + static_cast<int64_t>(block.tile_begin) * outputs;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += threads) {
    int sum = sums[i];
    for (int warp = 1; warp < active_warps; ++warp) sum = add(sum, sums[warp * ROW_TILES * outputs + i]);
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
