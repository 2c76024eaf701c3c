// The half kernel of lut_linear_a16.cuh: levels and x as float16, float32 sums.
#pragma once

#include "rcp/cuda/lut_linear_a16_block.cuh"

namespace rcp::cuda::a16 {

// The lane's chunks of a token and a unit as float16, in x of the unit: [sub-block][k-step s][token ^ s / 2][q][8
// values]. Returns the factor of the token: 1 for float16, else the power of two that brings the values into range.
template <int TOKENS>
__device__ __forceinline__ float stage_halves(const RawChunk (&raw)[2], FloatType type, int lane, int token,
                                              uint8_t* x) {
  const int i = lane / 4 % 2;
  uint8_t* to = x + (lane / 8 * 4 + 2 * i) * TOKENS * 64 + lane % 4 * 16 + (token ^ i) * 64;
  if (type == FloatType::float16) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t (&pairs)[chunk_columns] = raw[c].words;
      *reinterpret_cast<uint4*>(to + c * TOKENS * 64) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    return 1.0f;
  }
  float values[2][chunk_columns];
#pragma unroll
  for (int c = 0; c < 2; ++c) widen(raw[c], type, values[c]);
  const uint32_t largest = warp_max(largest_magnitude(values[1], largest_magnitude(values[0], 0)));
  const uint32_t exponent = max(largest >> 23, 15u);  // the largest becomes less than 2^15
  const float scale = __uint_as_float((268u - exponent) << 23);
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
  return largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : __uint_as_float((exponent - 14u) << 23);
}

// Two levels + 128, bytes 0, 1 (HIGH: 2, 3) of a word, as float16 levels: 1024 + u has the bits 0x6400 | u.
template <bool HIGH>
__device__ __forceinline__ uint32_t half_levels(uint32_t bytes) {
  uint32_t pair = ptx::permute(bytes, 0x64646464u, HIGH ? 0x4342u : 0x4140u);
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x64806480u));
  return pair;
}

template <int BITS, int GROUP, int TOKEN_TILES>
__global__ void __launch_bounds__(256, 1) half_kernel(const LutLinearParameters parameters) {
  constexpr int tokens = 8 * TOKEN_TILES;
  extern __shared__ uint4 shared[];
  Block<BITS, GROUP, tokens, half_token_bytes> block(parameters, reinterpret_cast<uint8_t*>(shared));
  using Unit = typename decltype(block)::Unit;
  const int lane = block.lane, gr = lane / 4, q = lane % 4;

  float acc[4 * TOKEN_TILES] = {};  // [token tile t]: rows gr (0, 1) and gr + 8 (2, 3), tokens 8 t + 2q and + 1
  // Columns of B without a token repeat the last token. Nobody reads their sums.
  int x_places[TOKEN_TILES][2];
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
    const int token = min(8 * t + gr, block.tokens - 1);
    x_places[t][0] = token * 64 + q * 16;
    x_places[t][1] = (token ^ 1) * 64 + q * 16;
  }
  const auto stage = [&](const RawChunk(&raw)[2], int token, uint8_t* x) {
    return stage_halves<tokens>(raw, block.p.call.x_type, lane, token, x);
  };
  block.run(stage, [&](const Unit& unit, const uint8_t* x, const float* factors) {
    float unit_sums[4 * TOKEN_TILES] = {};
    unit.visit_slots(0x80808080u, [&](int s, int first, const uint32_t (&bytes)[4][4], const float (&scale)[2]) {
      float c[TOKEN_TILES][4] = {};
#pragma unroll
      for (int step = first; step < first + Unit::steps; ++step) {
        uint32_t a[2][4];  // of the two m16n8k16: half h, bytes 0 1 and 2 3 as its k and k + 8
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[h][0] = half_levels<false>(bytes[step][2 * h]);
          a[h][1] = half_levels<false>(bytes[step][2 * h + 1]);
          a[h][2] = half_levels<true>(bytes[step][2 * h]);
          a[h][3] = half_levels<true>(bytes[step][2 * h + 1]);
        }
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
          const uint4 b = *reinterpret_cast<const uint4*>(x + x_places[t][step / 2] + (s * 4 + step) * tokens * 64);
          ptx::multiply(c[t], a[0], b.x, b.y);
          ptx::multiply(c[t], a[1], b.z, b.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * TOKEN_TILES; ++i) {
        unit_sums[i] = __fmaf_rn(scale[i % 4 / 2], c[i / 4][i % 4], unit_sums[i]);
      }
    });
#pragma unroll
    for (int i = 0; i < 4 * TOKEN_TILES; ++i) {
      acc[i] = __fmaf_rn(unit_sums[i], factors[i / 4 * 8 + 2 * q + i % 2], acc[i]);
    }
  });
  if (!block.sum_splits(acc)) return;
  const float scale = block.tensor_scale();
#pragma unroll
  for (int i = 0; i < 4 * TOKEN_TILES; ++i) {
    block.store(i / 4 * 8 + 2 * q + i % 2, gr + i % 4 / 2 * 8, acc[i], scale);
  }
}

}  // namespace rcp::cuda::a16
