// Launches of lut_linear with act_bits 4 and 8.
#pragma once

#include "rcp/cuda/lut_linear_gemm.cuh"
#include "rcp/cuda/lut_linear_gemv.cuh"
#include "rcp/cuda/lut_linear_quantize.cuh"

namespace rcp::cuda {

namespace integer {

using Kernel = void (*)(LutLinearParameters);

template <int BITS, int GROUP>
Kernel choose_kernel(const LutLinearPlan& plan) {
  constexpr int few = gemv_few_row_tiles;
  const bool is_few = plan.row_tiles == few;
  switch (plan.kernel) {
    case LutLinearKernel::one_token: {
      constexpr int many = gemv_many_row_tiles(0, BITS, GROUP);
      return is_few ? lut_linear_one_token<BITS, GROUP, few> : lut_linear_one_token<BITS, GROUP, many>;
    }
    case LutLinearKernel::few_tokens: {
      constexpr int many = gemv_many_row_tiles(1, BITS, GROUP), most_tokens = gemv_most_tokens(BITS, GROUP);
      if constexpr (most_tokens > 8) {
        if (plan.token_tiles == 2) return lut_linear_few_tokens<BITS, GROUP, 2, few>;
      }
      return is_few ? lut_linear_few_tokens<BITS, GROUP, 1, few> : lut_linear_few_tokens<BITS, GROUP, 1, many>;
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
    quantize<<<blocks, quantize_tokens_threads, 0, call.stream>>>(parameters);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return launch(integer::choose_kernel<BITS>(plan, call.group_size), parameters, plan);
}

}  // namespace rcp::cuda
