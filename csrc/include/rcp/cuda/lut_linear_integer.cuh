// Launches of lut_linear with act_bits 4 and 8.
#pragma once

#include "rcp/cuda/lut_linear_few_tokens.cuh"
#include "rcp/cuda/lut_linear_gemm.cuh"
#include "rcp/cuda/lut_linear_one_token.cuh"
#include "rcp/cuda/lut_linear_quantize.cuh"

namespace rcp::cuda {

namespace integer {

using Kernel = void (*)(LutLinearParameters);

template <int BITS, int GROUP>
Kernel choose_kernel(const LutLinearPlan& plan) {
  switch (plan.kernel) {
    case LutLinearKernel::one_token:
      return lut_linear_one_token<BITS, GROUP>;
    case LutLinearKernel::few_tokens: {
      constexpr int few = few_tokens_row_tiles, many = few_tokens_most_row_tiles(BITS, GROUP);
      if constexpr (gemv_most_tokens(BITS, GROUP) > 8) {
        if (plan.token_tiles == 2) return lut_linear_few_tokens<BITS, GROUP, 2, few>;
      }
      return plan.row_tiles == few ? lut_linear_few_tokens<BITS, GROUP, 1, few>
                                   : lut_linear_few_tokens<BITS, GROUP, 1, many>;
    }
    default:
      return lut_linear_many_tokens<BITS, GROUP>;
  }
}

template <int BITS>
Kernel choose_kernel(const LutLinearPlan& plan, int group_size) {
  return group_size == 32    ? choose_kernel<BITS, 32>(plan)
         : group_size == 64  ? choose_kernel<BITS, 64>(plan)
         : group_size == 128 ? choose_kernel<BITS, 128>(plan)
                             : choose_kernel<BITS, 0>(plan);
}

}  // namespace integer

// As lut_linear (lut_linear.cuh) for act_bits 4 and 8. BITS is call.bits, a template argument so that each width can be
// compiled by itself.
template <int BITS>
cudaError_t lut_linear_integer(const LutLinearCall& call, const LutLinearPlan& plan) {
  if (call.tokens == 0) return cudaSuccess;
  if (!is_supported(call) || call.act_bits == 16 || call.bits != BITS) return cudaErrorInvalidValue;
  const LutLinearParameters parameters = lut_linear_parameters(call, plan);
  if (plan.kernel != LutLinearKernel::one_token) {
    const auto blocks = static_cast<unsigned>((call.tokens + 7) / 8 * 8);
    const auto quantize = call.group_size == 32   ? lut_linear_quantize_tokens<32>
                          : call.group_size == 64 ? lut_linear_quantize_tokens<64>
                                                  : lut_linear_quantize_tokens<128>;
    const cudaError_t error = launch(quantize, parameters, dim3(blocks), quantize_tokens_threads, 0, plan.early_launch);
    if (error != cudaSuccess) return error;
  }
  // The kernel for many tokens does not wait by itself.
  return launch(integer::choose_kernel<BITS>(plan, call.group_size), parameters, plan,
                plan.early_launch && plan.kernel != LutLinearKernel::many_tokens);
}

}  // namespace rcp::cuda
