// Tokens -> B fragments and token scales, for the kernels of lut_linear that multiply several tokens. Rotates
// (optional), quantizes, and stores the bytes in the order in which a lane of mma.m16n8k32.s8 wants its operands: lanes
// load them in whole vectors and never rearrange them.
//
//   fragments [token tile][sub-block][2][32 lanes][16 bytes]: lane 4 * token + q, k-steps 0 and 1 in the first half, 2
//   and 3 in the second. The 8 bytes of a k-step are [h][j] of weight_layout.h
//
// Columns and tokens that do not exist are zeros.
#pragma once

#include "rcp/cuda/lut_linear_plan.h"
#include "rcp/cuda/quantize_token.cuh"

namespace rcp::cuda {

inline constexpr int quantize_tokens_threads = 256;

// Where row `natural` of Sylvester's matrix of order 2^bits is among the rows sorted by sign changes: the Gray code of
// its bit reversal, decoded.
__device__ __forceinline__ int sequency_of(int natural, int bits) {
  unsigned s = __brev(static_cast<unsigned>(natural)) >> (32 - bits);
  s ^= s >> 1;
  s ^= s >> 2;
  s ^= s >> 4;
  return static_cast<int>(s);
}

// One block for each token, padding tokens of the last token tile included. GROUP is 32 or 64. Every
// other group size uses 128.
template <int GROUP>
__global__ void __launch_bounds__(quantize_tokens_threads) lut_linear_quantize_tokens(const LutLinearParameters p) {
  __shared__ uint4 warp_values[2];
  __shared__ uint2 exchange[quantize_tokens_threads];
  // The next launch is the one that multiplies, and loads its first weights meanwhile.
  ptx::wait_for_previous_launch();
  ptx::allow_next_launch();
  const LutLinearCall& call = p.call;
  const int64_t token = blockIdx.x;
  const int sub_blocks = (p.units - 1) * unit_sub_blocks + p.tail_sub_blocks;
  const int chunks = sub_blocks * (sub_block_columns / chunk_columns), group = call.rotation_group;
  uint8_t* to = p.fragments + token / 8 * sub_blocks * 1024 + token % 8 * 64;
  const auto place = [&](int chunk) {
    const auto at = unit_layout<2, GROUP>().fragment_place(chunk % 16 * chunk_columns);
    return reinterpret_cast<uint2*>(to + chunk / 16 * 1024 + at.step / 2 * 512 + at.q * 16 + at.step % 2 * 8);
  };
  if (token >= call.tokens) {
    for (int chunk = threadIdx.x; chunk < chunks; chunk += quantize_tokens_threads) *place(chunk) = {0, 0};
    return;
  }
  // Two kept chunks a thread are 4096 columns a token.
  const char* x = static_cast<const char*>(call.x) + token * call.columns * (call.x_type == FloatType::float32 ? 4 : 2);
  TokenReader<2> reader(x, call.x_type, call.columns, 0, chunks, group);
  const TokenScale scale = token_scale(reader.amax(warp_values), call.clip, p.qmax, p.qmax_inverse);
  if (threadIdx.x == 0) p.token_scales[token] = scale.scale;
  reader.visit(chunks, [&](int chunk, const float (&values)[chunk_columns]) {
    uint2 rounded = quantize_chunk(values, scale.reciprocal, call.clip < 1.0f, p.qmax);
    if (group && call.rotation_sequency) {
      // Rotated values in natural order -> sequency order, through the warp's part of shared memory. A warp has 256
      // columns, which are whole runs of any rotation_group.
      auto* bytes = reinterpret_cast<uint8_t*>(exchange) + threadIdx.x / 32 * 256;
      const int bits = group == 32 ? 5 : group == 64 ? 6 : 7;
      const int first = threadIdx.x % 32 * 8, run = first & -group;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = i < 4 ? rounded.x : rounded.y;
        bytes[run + sequency_of(first - run + i, bits)] = static_cast<uint8_t>(word >> (i % 4 * 8));
      }
      __syncwarp();
      rounded = exchange[threadIdx.x];
    }
    if (chunk < chunks) *place(chunk) = rounded;
  });
}

}  // namespace rcp::cuda
