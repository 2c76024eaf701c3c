// lut_linear for 1 to 16 tokens, act_bits 4 and 8. The order of the work and of the sums is in lut_linear_stream.cuh.
#pragma once

#include "rcp/cuda/lut_linear_stream.cuh"

namespace rcp::cuda {

// One token. Every block quantizes the token for itself: it takes the maximum of the whole token, and rounds the
// columns of its split. Dynamic shared memory: sums [warp][ROW_TILES][64], then the quantized columns.
template <int BITS, int GROUP, int ROW_TILES>
__global__ void __launch_bounds__(32 * gemv_warps, 1) lut_linear_one_token(const LutLinearParameters parameters) {
  const LutLinearParameters p = parameters;  // a reference to the parameters themselves would be a generic address
  extern __shared__ uint4 shared[];
  __shared__ uint4 zeros[2];
  __shared__ uint32_t warp_values[8];
  int* sums = reinterpret_cast<int*>(shared);
  auto* bytes = reinterpret_cast<uint8_t*>(sums + gemv_warps * ROW_TILES * 64);
  using StreamType = stream::Stream<BITS, GROUP, 0, ROW_TILES>;
  constexpr int unit_chunks = unit_columns / chunk_columns;
  StreamType main_loop(p);
  asm("" : "+r"(main_loop.lane));  // kept in a register, not computed again

  // All warps load the token before any warp loads weights, because every result waits for the token. In a simulation
  // with cold caches this order was 8 to 17 % faster than weights first. Two kept chunks a thread are 4096 columns.
  TokenReader<2> token(p.call.x, p.call.x_type, p.call.columns, main_loop.unit_begin * unit_chunks,
                       p.units * unit_chunks, 0);
  if (threadIdx.x < 2) zeros[threadIdx.x] = {0, 0, 0, 0};
  __syncthreads();
  main_loop.start();
  const uint4 header = ptx::load_vector(p.call.weight);
  const TokenScale scale = token_scale(token.amax(warp_values), p.call.clip, p.qmax, p.qmax_inverse);
  const int chunks = (main_loop.unit_end - main_loop.unit_begin) * unit_chunks;
  token.visit(chunks, [&](int chunk, const float (&values)[chunk_columns]) {
    const auto at = unit_layout<BITS, GROUP>().fragment_place(chunk % 16 * chunk_columns);
    *reinterpret_cast<uint2*>(bytes + chunk / 16 * sub_block_columns + at.q * 32 + at.step * 8) =
        quantize_chunk(values, scale.reciprocal, p.call.clip < 1.0f, p.qmax);
  });
  __syncthreads();

  main_loop.run(
      [&](int unit, uint32_t (&activation)[unit_sub_blocks][1][8]) {
        using PartType = fragments::Part<BITS, GROUP>;
        constexpr int steps = PartType::steps_per_slot;
        const int lane = main_loop.lane;
        const uint8_t* at = bytes + (unit - main_loop.unit_begin) * unit_columns + lane % 4 * 32;
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
      },
      sums);
  stream::finish(main_loop, sums, header, [&](int64_t) { return scale.scale; });
}

// 2 to 16 tokens, which lut_linear_quantize_tokens has quantized. Dynamic shared memory: sums
// [warp][ROW_TILES][TOKEN_TILES * 128].
template <int BITS, int GROUP, int TOKEN_TILES, int ROW_TILES>
__global__ void __launch_bounds__(32 * gemv_warps, 1) lut_linear_few_tokens(const LutLinearParameters parameters) {
  const LutLinearParameters p = parameters;
  extern __shared__ uint4 shared[];
  int* sums = reinterpret_cast<int*>(shared);
  using StreamType = stream::Stream<BITS, GROUP, TOKEN_TILES, ROW_TILES>;
  StreamType main_loop(p);
  main_loop.start();
  const uint4 header = ptx::load_vector(p.call.weight);
  const int sub_blocks = (p.units - 1) * unit_sub_blocks + p.tail_sub_blocks;
  main_loop.run(
      [&](int unit, uint32_t (&activation)[unit_sub_blocks][TOKEN_TILES][8]) {
#pragma unroll
        for (int b = 0; b < unit_sub_blocks; ++b) {
          const int sub_block = unit * unit_sub_blocks + b;
#pragma unroll
          for (int t = 0; t < TOKEN_TILES; ++t) {
            uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
            if (sub_block < sub_blocks) {
              const auto* at = reinterpret_cast<const uint4*>(p.fragments) +
                               (static_cast<int64_t>(t) * sub_blocks + sub_block) * 64 + threadIdx.x % 32;
              low = at[0];
              high = at[32];
            }
            fragments::unpack(low, high, activation[b][t]);
          }
        }
      },
      sums);
  stream::finish(main_loop, sums, header, [&](int64_t token) { return p.token_scales[token]; });
}

}  // namespace rcp::cuda
