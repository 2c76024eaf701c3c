// fixed_point_kernel of lut_linear_a16.cuh: x as digits, int8 tensor cores, exact group sums.
#pragma once

#include "rcp/cuda/lut_linear_a16_block.cuh"

namespace rcp::cuda::a16 {

constexpr int fixed_token_bytes = 2048;  // of x, a unit

// Four values as signed base-256 digits: digits[d] holds digit d of the four, a byte each.
__device__ __forceinline__ void split_digits(const float* values, float scale, uint32_t (&digits)[4]) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Adding 128 at each digit makes them the bytes of the sum; then each byte minus 128.
    q[i] = (static_cast<uint32_t>(__float2int_rn(__fmul_rn(values[i], scale))) + 0x80808080u) ^ 0x80808080u;
  }
  using fragments::permute;
  const uint32_t low01 = permute(q[0], q[1], 0x5140), high01 = permute(q[0], q[1], 0x7362);
  const uint32_t low23 = permute(q[2], q[3], 0x5140), high23 = permute(q[2], q[3], 0x7362);
  digits[0] = permute(low01, low23, 0x5410);
  digits[1] = permute(low01, low23, 0x7632);
  digits[2] = permute(high01, high23, 0x5410);
  digits[3] = permute(high01, high23, 0x7632);
}

// x of a stage as digits: [unit][sub-block][pair of k-steps i][pair of tokens][column of B = 4 (token % 2) + digit, ^
// i] [q][16 bytes]. The exclusive or keeps the stores free of bank conflicts.
template <class Shape, class T, int TOKENS, class B>
__device__ __forceinline__ void stage_digits(const B& block, int first_unit, int units) {
  const int lane = block.lane, i = lane / 4 % 2;
  uint8_t* const lane_to = block.staged + (lane / 8 * 2 + i) * TOKENS * 256 + lane % 4 * 16;
  for (int task = threadIdx.x / 32; task < units * TOKENS; task += blockDim.x / 32) {
    const int unit = task / TOKENS, token = task % TOKENS;
    if (token >= block.tokens) {
      if (lane == 0) block.factors[unit * TOKENS + token] = 0.0f;
      continue;
    }
    float values[2][8];
    load_token<Shape>(static_cast<const T*>(block.call.x) + (block.first_token + token) * block.call.columns,
                      first_unit + unit, block.call.columns, lane, values);
    const uint32_t largest = largest_of_warp(values);
    const uint32_t exponent = max(largest >> 23, 30u);  // 2^-97: what is smaller keeps fewer bits
    const float scale = __uint_as_float((283u - exponent) << 23);
    uint32_t digits[4][4];  // [chunk, half][digit]
#pragma unroll
    for (int c = 0; c < 4; ++c) split_digits(values[c / 2] + c % 2 * 4, scale, digits[c]);
    uint8_t* to = lane_to + unit * B::x_bytes + token / 2 * 512;
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      *reinterpret_cast<uint4*>(to + ((token % 2 * 4 + d) ^ i) * 64) =
          make_uint4(digits[0][d], digits[1][d], digits[2][d], digits[3][d]);
    }
    if (lane == 0) {
      block.factors[unit * TOKENS + token] =
          largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : __uint_as_float((exponent - 29u) << 23);
    }
  }
}

template <int BITS, int SLOTS, int TILES>
__global__ void __launch_bounds__(256, 1) fixed_point_kernel(const KernelArguments arguments) {
  using Shape = UnitShape<BITS, SLOTS>;
  constexpr int tokens = 2 * TILES;
  extern __shared__ uint4 shared[];
  Block<Shape, tokens, fixed_token_bytes> block(arguments, reinterpret_cast<uint8_t*>(shared));
  const int lane = block.lane, gr = lane / 4, q = lane % 4;
  block.fetch();
  block.fetch();

  // Sums of rows gr and gr + 8 for token 2t + q / 2: digits 0 and 1 (q even) or 2 and 3 (q odd).
  float acc[TILES][2] = {};
  // Columns of B without a token repeat the last one; nobody reads their sums.
  int x_places[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const int token = min(2 * t + gr / 4, block.tokens - 1), column = token % 2 * 4 + gr % 4;
    x_places[t][0] = token / 2 * 512 + column * 64 + q * 16;
    x_places[t][1] = token / 2 * 512 + (column ^ 1) * 64 + q * 16;
  }
  const float digit = q % 2 ? 65536.0f : 1.0f;
  for (int stage = block.first_unit; stage < block.last_unit; stage += arguments.units_per_stage) {
    const int stage_units = min(arguments.units_per_stage, block.last_unit - stage);
    if (stage != block.first_unit) __syncthreads();
    if (block.call.x_type == FloatType::float16) {
      stage_digits<Shape, __half, tokens>(block, stage, stage_units);
    } else if (block.call.x_type == FloatType::bfloat16) {
      stage_digits<Shape, __nv_bfloat16, tokens>(block, stage, stage_units);
    } else {
      stage_digits<Shape, float, tokens>(block, stage, stage_units);
    }
    __syncthreads();
    if (!block.active) continue;
    const uint8_t* x = block.staged;
    const float* factors = block.factors + q / 2;
    for (int unit = stage; unit < stage + stage_units; ++unit) {
      copy_wait<1>();
      __syncwarp();
      const int sub_blocks = block.sub_blocks(unit);
      const uint8_t* codes = block.oldest();
      const uint8_t* tables = codes + Shape::code_bytes(sub_blocks);
      const uint8_t* scales = tables + Shape::table_bytes;
      float part[TILES][2] = {}, scale[2][4];
      uint32_t chunk[12], code[Shape::words];
#pragma unroll
      for (int s = 0; s < unit_sub_blocks; ++s) {
        if (s >= sub_blocks) break;
        Shape::load_codes(codes, lane, s, chunk, code);
        uint32_t a[4][4];
        Shape::expand(tables, gr, s, code, 0u, a);
#pragma unroll
        for (int slot = s * SLOTS; slot < (s + 1) * SLOTS; ++slot) {
          if (slot % 4 == 0) Shape::load_scales(scales, gr, slot / 4, scale);
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
            int32_t c[4] = {};
#pragma unroll
            for (int k = 0; k < Shape::steps; ++k) {
              const int step = (slot - s * SLOTS) * Shape::steps + k;
              const uint4 b =
                  *reinterpret_cast<const uint4*>(x + x_places[t][step / 2] + (s * 2 + step / 2) * tokens * 256);
              fragments::multiply(c, a[step], step % 2 ? b.z : b.x, step % 2 ? b.w : b.y, c);
            }
            // Two digits as one integer: |c| <= 128 * 128 * 128.
            part[t][0] = __fmaf_rn(scale[0][slot % 4], __int2float_rn(c[0] + 256 * c[1]), part[t][0]);
            part[t][1] = __fmaf_rn(scale[1][slot % 4], __int2float_rn(c[2] + 256 * c[3]), part[t][1]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const float factor = factors[2 * t] * digit;
        acc[t][0] = __fmaf_rn(part[t][0], factor, acc[t][0]);
        acc[t][1] = __fmaf_rn(part[t][1], factor, acc[t][1]);
      }
      x += block.x_bytes;
      factors += tokens;
      __syncwarp();
      block.fetch();
    }
  }
  // All digits; then lane q keeps row gr + 8 (q % 2) of token 2t + q / 2.
  float sums[TILES];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) acc[t][r] = __fadd_rn(acc[t][r], __shfl_xor_sync(0xffffffffu, acc[t][r], 1));
    sums[t] = q % 2 ? acc[t][1] : acc[t][0];
  }
  if (!sum_splits(sums, static_cast<float*>(block.call.workspace), static_cast<uint32_t*>(block.call.counters))) return;
  const float scale = block.tensor_scale();
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    block.store(block.first_token + 2 * t + q / 2, block.row_tile * tile_rows + gr + 8 * (q % 2), sums[t], scale);
  }
}

}  // namespace rcp::cuda::a16
