// half_kernel of lut_linear_a16.cuh: levels and x as float16, float32 sums.
#pragma once

#include <type_traits>

#include "rcp/cuda/lut_linear_a16_block.cuh"

namespace rcp::cuda::a16 {

constexpr int half_token_bytes = 1024;  // of x, a unit

// x of a stage as float16: [unit][sub-block][k-step s][token ^ s / 2][q][8 values].
template <class Shape, class T, int TOKENS, class B>
__device__ __forceinline__ void stage_halves(const B& block, int first_unit, int units) {
  constexpr bool scaled = !std::is_same_v<T, __half>;
  const int lane = block.lane, i = lane / 4 % 2;
  uint8_t* const lane_to = block.staged + (lane / 8 * 4 + 2 * i) * TOKENS * 64 + lane % 4 * 16;
  for (int task = threadIdx.x / 32; task < units * TOKENS; task += blockDim.x / 32) {
    const int unit = task / TOKENS, token = task % TOKENS;
    if (token >= block.tokens) {
      if (lane == 0) block.factors[unit * TOKENS + token] = 0.0f;
      continue;
    }
    const T* x = static_cast<const T*>(block.call.x) + (block.first_token + token) * block.call.columns;
    uint8_t* to = lane_to + unit * B::x_bytes + (token ^ i) * 64;
    float factor = 1.0f;
    if (!scaled && is_whole(x, first_unit + unit, block.call.columns)) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        *reinterpret_cast<uint4*>(to + c * TOKENS * 64) =
            __ldg(reinterpret_cast<const uint4*>(x + chunk_place<Shape>(first_unit + unit, lane, c)));
      }
    } else {
      float values[2][8], scale = 1.0f;
      load_token<Shape>(x, first_unit + unit, block.call.columns, lane, values);
      if constexpr (scaled) {
        const uint32_t largest = largest_of_warp(values);
        const uint32_t exponent = max(largest >> 23, 15u);  // the largest becomes less than 2^15
        scale = __uint_as_float((268u - exponent) << 23);
        factor = largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : __uint_as_float((exponent - 14u) << 23);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __half2 pair =
              __floats2half2_rn(__fmul_rn(values[c][2 * j], scale), __fmul_rn(values[c][2 * j + 1], scale));
          pairs[j] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        *reinterpret_cast<uint4*>(to + c * TOKENS * 64) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
    if (lane == 0) block.factors[unit * TOKENS + token] = factor;
  }
}

// Two levels + 128, bytes 0, 1 (HIGH: 2, 3) of a word, as float16 levels: 1024 + u has the bits 0x6400 | u.
template <bool HIGH>
__device__ __forceinline__ uint32_t half_levels(uint32_t bytes) {
  uint32_t pair = fragments::permute(bytes, 0x64646464u, HIGH ? 0x4342u : 0x4140u);
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x64806480u));
  return pair;
}

template <int BITS, int SLOTS, int TILES>
__global__ void __launch_bounds__(256, 1) half_kernel(const KernelArguments arguments) {
  using Shape = UnitShape<BITS, SLOTS>;
  extern __shared__ uint4 shared[];
  Block<Shape, 8 * TILES, half_token_bytes> block(arguments, reinterpret_cast<uint8_t*>(shared));
  const int lane = block.lane, gr = lane / 4, q = lane % 4;
  block.fetch();
  block.fetch();

  float acc[TILES][4] = {};  // rows gr (0, 1) and gr + 8 (2, 3), tokens 8 t + 2q and + 1
  // Columns of B without a token repeat the last one; nobody reads their sums.
  int x_places[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const int token = min(8 * t + gr, block.tokens - 1);
    x_places[t][0] = token * 64 + q * 16;
    x_places[t][1] = (token ^ 1) * 64 + q * 16;
  }
  for (int stage = block.first_unit; stage < block.last_unit; stage += arguments.units_per_stage) {
    const int stage_units = min(arguments.units_per_stage, block.last_unit - stage);
    if (stage != block.first_unit) __syncthreads();
    if (block.call.x_type == FloatType::float16) {
      stage_halves<Shape, __half, 8 * TILES>(block, stage, stage_units);
    } else {
      stage_halves<Shape, __nv_bfloat16, 8 * TILES>(block, stage, stage_units);
    }
    __syncthreads();
    if (!block.active) continue;
    const uint8_t* x = block.staged;
    const float* factors = block.factors;
    for (int unit = stage; unit < stage + stage_units; ++unit) {
      copy_wait<1>();
      __syncwarp();
      const int sub_blocks = block.sub_blocks(unit);
      const uint8_t* codes = block.oldest();
      const uint8_t* tables = codes + Shape::code_bytes(sub_blocks);
      const uint8_t* scales = tables + Shape::table_bytes;
      float part[TILES][4] = {}, scale[2][4];
      uint32_t chunk[12], code[Shape::words];
#pragma unroll
      for (int s = 0; s < unit_sub_blocks; ++s) {
        if (s >= sub_blocks) break;
        Shape::load_codes(codes, lane, s, chunk, code);
        uint32_t bytes[4][4];
        Shape::expand(tables, gr, s, code, 0x80808080u, bytes);
#pragma unroll
        for (int slot = s * SLOTS; slot < (s + 1) * SLOTS; ++slot) {
          if (slot % 4 == 0) Shape::load_scales(scales, gr, slot / 4, scale);
          float c[TILES][4] = {};
#pragma unroll
          for (int k = 0; k < Shape::steps; ++k) {
            const int step = (slot - s * SLOTS) * Shape::steps + k;
            uint32_t a[2][4];  // of the two m16n8k16: half h, bytes 0 1 and 2 3 as its k and k + 8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              a[h][0] = half_levels<false>(bytes[step][2 * h]);
              a[h][1] = half_levels<false>(bytes[step][2 * h + 1]);
              a[h][2] = half_levels<true>(bytes[step][2 * h]);
              a[h][3] = half_levels<true>(bytes[step][2 * h + 1]);
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
              const uint4 b = *reinterpret_cast<const uint4*>(x + x_places[t][step / 2] + (s * 4 + step) * TILES * 512);
              multiply(c[t], a[0], b.x, b.y);
              multiply(c[t], a[1], b.z, b.w);
            }
          }
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) part[t][i] = __fmaf_rn(scale[i / 2][slot % 4], c[t][i], part[t][i]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[t][i] = __fmaf_rn(part[t][i], factors[8 * t + 2 * q + i % 2], acc[t][i]);
      }
      x += block.x_bytes;
      factors += 8 * TILES;
      __syncwarp();
      block.fetch();
    }
  }
  float sums[4 * TILES];
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) sums[i] = acc[i / 4][i % 4];
  if (!sum_splits(sums, static_cast<float*>(block.call.workspace), static_cast<uint32_t*>(block.call.counters))) return;
  const float scale = block.tensor_scale();
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) {
    block.store(block.first_token + i / 4 * 8 + 2 * q + i % 2, block.row_tile * tile_rows + gr + i % 4 / 2 * 8, sums[i],
                scale);
  }
}

}  // namespace rcp::cuda::a16
