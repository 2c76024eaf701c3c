// lut_linear with act_bits 16 for CUDA: x is not quantized. The weight's blob is the same for all act_bits. Two
// kernels:
//
// fixed_point_kernel, up to 4 tokens (float32 x: any number). x becomes four signed base-256 digits of a 31-bit fixed
//   point, with one exponent for a token and 512 columns. The digits of two tokens are the eight columns of an int8
//   mma. The sum of a group is therefore exact, and decoding costs the same as with act_bits 8: turning levels into
//   float16 would cost one more instruction a weight. An int8 mma multiplies 16 x 32 weights, a float16 mma 16 x 16.
//   float16 and bfloat16 x within 2^-19 and 2^-22 of the largest |x| of their 512 columns enter exactly.
//
// half_kernel, 5 tokens or more of float16 or bfloat16. Levels become float16, and m16n8k16 sums in float32. A row tile
//   is expanded once for 8, 16 or 32 tokens. A power of two for a token and 512 columns brings bfloat16 x into
//   float16's range, because sm_75 has no bfloat16 mma. This is exact for values within 2^-31 of the largest.
//
// In both kernels one warp computes one row tile. It copies its weights by cp.async, two units ahead, and starts the
// first two copies before it loads x. The warps of a block share x. Issued SASS instructions per weight at 4096 x 4096,
// G = 128, sm_86, with prologue and epilogue (counted, 84 multiprocessors): one token 1.63, 1.78 and 2.50 for 2, 3 and
// 4 bits; 8 tokens 3.2, 3.3 and 4.1.
//
// Numerics. A group is summed as above. Then, with g ascending inside a unit, units ascending inside a split, and
// splits ascending:
//
//   unit_sum = fma(scale[n, g], I[m, n, g], unit_sum)
//   acc = fma(unit_sum, 2^e[m, unit], acc)
//   y = fma(acc, tensor_scale, bias[n])
//
// A group of more than 128 columns counts as groups of 128. The order depends on the shape, on the number of
// multiprocessors and on the kernel, never on timing: two runs agree bit for bit. With
// S = ceil(K / min(G, 128)) + 2 ceil(K / 512) + 3 roundings outside the groups, y before the cast is within
//
//   fixed point   3 S 2^-24 sum |x * weight| + 2^-30 (sum over units of max|x| sum |weight|)        3: signed digits
//   half          (S + G / 16) 2^-23 sum |x * weight|, if an mma of 16 products rounds to 2^-23, as the truncation of
//                 tensor cores does; with bfloat16 x also 2^-38 (sum over units of max|x| sum |weight|)
//
// of the exact result, plus 2^-24 |bias|. NaN and Inf in x make all outputs of their token NaN; in half_kernel with
// float16 x they spread as in any linear layer. A blob with a wrong magic, version or shape gives NaN.
#pragma once

#include "rcp/cuda/lut_linear_a16_fixed_point.cuh"
#include "rcp/cuda/lut_linear_a16_half.cuh"

namespace rcp::cuda {
namespace a16 {

template <int BITS, int GROUP>
auto choose_kernel(const LutLinearPlan& plan) {
  const int tiles = plan.token_tiles;
  if (plan.kernel == LutLinearKernel::fixed_point) {
    return tiles == 1 ? fixed_point_kernel<BITS, GROUP, 1> : fixed_point_kernel<BITS, GROUP, 2>;
  }
  return tiles == 1   ? half_kernel<BITS, GROUP, 1>
         : tiles == 2 ? half_kernel<BITS, GROUP, 2>
                      : half_kernel<BITS, GROUP, 4>;
}

}  // namespace a16

// As lut_linear (lut_linear.cuh) for act_bits 16. rotation_group must be 0: transform x before the call.
template <int BITS>
cudaError_t lut_linear_a16(const LutLinearCall& call, const LutLinearPlan& plan) {
  if (call.tokens == 0) return cudaSuccess;
  if (!is_supported(call) || call.act_bits != 16 || call.bits != BITS) return cudaErrorInvalidValue;
  const auto kernel = call.group_size == 32   ? a16::choose_kernel<BITS, 32>(plan)
                      : call.group_size == 64 ? a16::choose_kernel<BITS, 64>(plan)
                                              : a16::choose_kernel<BITS, 128>(plan);
  return launch(kernel, lut_linear_parameters(call, plan), plan, false);
}

}  // namespace rcp::cuda
