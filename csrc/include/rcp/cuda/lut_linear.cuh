// lut_linear on CUDA: y = x W^T + bias with a packed weight (weight_layout.h), as docs/numerics.md. Raw device pointers
// and a stream. Nothing is allocated, copied or waited for, so a launch can be captured into a graph.
//
// A kernel cannot raise an error without a synchronisation. On the device therefore
//   - a token with NaN or Inf (act_bits 4 and 8) gets NaN in all its outputs,
//   - a weight with a wrong magic, version or shape gives NaN in all outputs.
#pragma once

#include "rcp/cuda/lut_linear_a16.cuh"
#include "rcp/cuda/lut_linear_integer.cuh"

namespace rcp::cuda {

// BITS is call.bits; see lut_linear_integer.
template <int BITS>
cudaError_t lut_linear_of_bits(const LutLinearCall& call, const LutLinearPlan& plan) {
  return call.act_bits == 16 ? lut_linear_a16<BITS>(call, plan) : lut_linear_integer<BITS>(call, plan);
}

// Enqueues the launches of plan_lut_linear(call, ...). cudaErrorInvalidValue for a call that is not supported, else the
// result of the launch. No tokens: no launch.
inline cudaError_t lut_linear(const LutLinearCall& call, const LutLinearPlan& plan) {
  switch (call.bits) {
    case 2:
      return lut_linear_of_bits<2>(call, plan);
    case 3:
      return lut_linear_of_bits<3>(call, plan);
    case 4:
      return lut_linear_of_bits<4>(call, plan);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rcp::cuda
