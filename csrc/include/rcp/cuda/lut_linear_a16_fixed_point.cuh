// The fixed-point kernel of lut_linear_a16.cuh: x as digits, int8 tensor cores, exact group sums.
#pragma once

#include "rcp/cuda/lut_linear_a16_block.cuh"

namespace rcp::cuda::a16 {

// Four values as signed base-256 digits: digits[d] holds digit d of the four, a byte each.
__device__ __forceinline__ void split_digits(const float* values, float scale, uint32_t (&digits)[4]) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Adding 128 at each digit makes the digits the bytes of the sum. Then 128 is subtracted from each byte.
    q[i] = (static_cast<uint32_t>(__float2int_rn(__fmul_rn(values[i], scale))) + 0x80808080u) ^ 0x80808080u;
  }
  using ptx::permute;
  const uint32_t low01 = permute(q[0], q[1], 0x5140), high01 = permute(q[0], q[1], 0x7362);
  const uint32_t low23 = permute(q[2], q[3], 0x5140), high23 = permute(q[2], q[3], 0x7362);
  digits[0] = permute(low01, low23, 0x5410);
  digits[1] = permute(low01, low23, 0x7632);
  digits[2] = permute(high01, high23, 0x5410);
  digits[3] = permute(high01, high23, 0x7632);
}

// The lane's chunks of a token and a unit as digits, in x of the unit: [sub-block][pair of k-steps i][pair of tokens]
// [column of B = 4 (token % 2) + digit, ^ i][q][16 bytes]. The exclusive or keeps the stores free of bank conflicts.
// Returns the factor of the token.
template <int TOKENS>
__device__ __forceinline__ float stage_digits(const RawChunk (&raw)[2], FloatType type, int lane, int token,
                                              uint8_t* x) {
  const int i = lane / 4 % 2;
  float values[2][chunk_columns];
#pragma unroll
  for (int c = 0; c < 2; ++c) widen(raw[c], type, values[c]);
  const uint32_t largest = warp_max(largest_magnitude(values[1], largest_magnitude(values[0], 0)));
  const uint32_t exponent = max(largest >> 23, 30u);  // 2^-97: smaller values keep fewer bits
  const float scale = __uint_as_float((283u - exponent) << 23);
  uint32_t digits[4][4];  // [chunk, half][digit]
#pragma unroll
  for (int c = 0; c < 4; ++c) split_digits(values[c / 2] + c % 2 * 4, scale, digits[c]);
  uint8_t* to = x + (lane / 8 * 2 + i) * TOKENS * 256 + lane % 4 * 16 + token / 2 * 512;
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    *reinterpret_cast<uint4*>(to + ((token % 2 * 4 + d) ^ i) * 64) =
        make_uint4(digits[0][d], digits[1][d], digits[2][d], digits[3][d]);
  }
  return largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : __uint_as_float((exponent - 29u) << 23);
}

template <int BITS, int GROUP, int TOKEN_TILES>
__global__ void __launch_bounds__(256, 1) fixed_point_kernel(const LutLinearParameters parameters) {
  constexpr int tokens = 2 * TOKEN_TILES;
  extern __shared__ uint4 shared[];
  Block<BITS, GROUP, tokens, fixed_point_token_bytes> block(parameters, reinterpret_cast<uint8_t*>(shared));
  using Unit = typename decltype(block)::Unit;
  const int lane = block.lane, gr = lane / 4, q = lane % 4;

  // Sums of rows gr and gr + 8 for token 2t + q / 2: digits 0 and 1 (q even) or 2 and 3 (q odd).
  float acc[TOKEN_TILES][2] = {};
  // Columns of B without a token repeat the last token. Nobody reads their sums.
  int x_places[TOKEN_TILES][2];
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
    const int token = min(2 * t + gr / 4, block.tokens - 1), column = token % 2 * 4 + gr % 4;
    x_places[t][0] = token / 2 * 512 + column * 64 + q * 16;
    x_places[t][1] = token / 2 * 512 + (column ^ 1) * 64 + q * 16;
  }
  const float digit = q % 2 ? 65536.0f : 1.0f;
  const auto stage = [&](const RawChunk(&raw)[2], int token, uint8_t* x) {
    return stage_digits<tokens>(raw, block.p.call.x_type, lane, token, x);
  };
  block.run(stage, [&](const Unit& unit, const uint8_t* x, const float* factors) {
    float unit_sums[TOKEN_TILES][2] = {};
    unit.visit_slots(0u, [&](int s, int first, const uint32_t (&a)[4][4], const float (&scale)[2]) {
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t) {
        int32_t c[4] = {};
#pragma unroll
        for (int step = first; step < first + Unit::steps; ++step) {
          const uint4 b =
              *reinterpret_cast<const uint4*>(x + x_places[t][step / 2] + (s * 2 + step / 2) * tokens * 256);
          ptx::multiply(c, a[step], step % 2 ? b.z : b.x, step % 2 ? b.w : b.y, c);
        }
        // Two digits as one integer: |c| <= 128 * 128 * 128.
        unit_sums[t][0] = __fmaf_rn(scale[0], __int2float_rn(c[0] + 256 * c[1]), unit_sums[t][0]);
        unit_sums[t][1] = __fmaf_rn(scale[1], __int2float_rn(c[2] + 256 * c[3]), unit_sums[t][1]);
      }
    });
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
      const float factor = factors[2 * t + q / 2] * digit;
      acc[t][0] = __fmaf_rn(unit_sums[t][0], factor, acc[t][0]);
      acc[t][1] = __fmaf_rn(unit_sums[t][1], factor, acc[t][1]);
    }
  });
  // Adds the other two digits. Lane q keeps row gr + 8 (q % 2) of token 2t + q / 2.
  float sums[TOKEN_TILES];
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) acc[t][r] = __fadd_rn(acc[t][r], __shfl_xor_sync(0xffffffffu, acc[t][r], 1));
    sums[t] = q % 2 ? acc[t][1] : acc[t][0];
  }
  if (!block.sum_splits(sums)) return;
  const float scale = block.tensor_scale();
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) block.store(2 * t + q / 2, gr + 8 * (q % 2), sums[t], scale);
}

}  // namespace rcp::cuda::a16
