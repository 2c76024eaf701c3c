// What the integer kernels share besides the multiplication: a block's place (GEMV kernels), and the store of y.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "rcp/cuda/lut_linear_plan.h"
#include "rcp/cuda/values.cuh"
#include "rcp/cuda/weight_header.cuh"

namespace rcp::cuda {

// The row tiles and units of a block of the GEMV kernels, and the place of a thread in it.
struct GemvBlock {
  int lane, warp, tile_begin, tiles, unit_begin, unit_end;

  __device__ __forceinline__ GemvBlock(const LutLinearParameters& p, int block_tiles) {
    // The shuffle tells the compiler that the warp's index is uniform.
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
    lane = threadIdx.x % 32;
    tile_begin = blockIdx.x * block_tiles;
    tiles = min(block_tiles, p.row_tiles - tile_begin);
    unit_begin = blockIdx.y * p.units_per_split;
    unit_end = min(unit_begin + p.units_per_split, p.units);
  }
};

// What an output takes from its row, besides the sum. `scale` is that of a row that is one group.
struct RowTerms {
  float bias, scale;
};

template <int BITS, int GROUP>
__device__ __forceinline__ RowTerms load_row_terms(const LutLinearParameters& p, int n) {
  RowTerms terms{0.0f, 0.0f};
  if (n >= p.call.rows) return terms;
  if constexpr (GROUP == 0) {
    // Slot 0 of the first unit.
    const CudaLayout layout{p.call.rows, p.call.columns, p.call.columns, BITS};
    const uint8_t* first_unit = p.call.weight + layout.unit_offset(n / tile_rows, 0);
    const auto* scales = reinterpret_cast<const __half*>(first_unit + layout.scale_area(layout.sub_blocks_of(0)));
    terms.scale = __half2float(__ldg(scales + layout.scale_offset(n % tile_rows, 0) / 2));
  }
  if (p.call.bias != nullptr) terms.bias = load_value(p.call.bias, p.call.bias_type, n);
  return terms;
}

// Stores the output of a token and of row n, if it exists. `sum` is a value of fragments::Sums::bits, `scale` the
// product of the token's and the tensor's.
template <int GROUP>
__device__ __forceinline__ void store_output(const LutLinearParameters& p, int n, const RowTerms& terms, int64_t token,
                                             int sum, float scale) {
  if (n >= p.call.rows) return;
  const float total = GROUP == 0 ? __fmul_rn(terms.scale, static_cast<float>(sum)) : __int_as_float(sum);
  store_value(p.call.y, p.call.x_type, token * p.call.rows + n, __fmaf_rn(total, scale, terms.bias));
}

// The same of kernels with several tokens, whose scales are p.token_scales.
template <int BITS, int GROUP>
__device__ __forceinline__ void store_output(const LutLinearParameters& p, int tile, int row, int64_t token, int sum,
                                             float tensor_scale) {
  const int n = tile * tile_rows + row;
  if (token >= p.call.tokens) return;
  store_output<GROUP>(p, n, load_row_terms<BITS, GROUP>(p, n), token, sum,
                      __fmul_rn(p.token_scales[token], tensor_scale));
}

}  // namespace rcp::cuda
