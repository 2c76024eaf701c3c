// lut_linear for 2 to 16 tokens, act_bits 4 and 8. The order of the work and of the sums is in lut_linear_stream.cuh.
#pragma once

#include "rcp/cuda/lut_linear_stream.cuh"

namespace rcp::cuda {

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
  // The weights are on their way while the launch that quantizes the tokens ends.
  ptx::wait_for_previous_launch();
  ptx::allow_next_launch();
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
  stream::finish(main_loop, sums, header);
}

}  // namespace rcp::cuda
