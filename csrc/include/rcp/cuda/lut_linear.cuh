// lut_linear on CUDA: y = x W^T + bias with a packed weight (lut_linear_cuda_layout.h), as docs/numerics.md. Raw device
// pointers and a stream; nothing is allocated, copied or waited for, so a launch can be captured into a graph.
//
// A kernel cannot raise an error without a synchronisation, so on the device
//   - a token with NaN or Inf (act_bits 4 and 8) gets NaN in all its outputs,
//   - a weight without this layout's magic, or of another version or shape, gives NaN in all outputs.
#pragma once

#include "rcp/cuda/lut_linear_a16.cuh"
#include "rcp/cuda/lut_linear_integer.cuh"

namespace rcp::cuda {

// Bytes of scratch for a launch on a device with that many multiprocessors; contents do not matter.
inline size_t lut_linear_workspace_bytes(const LutLinearArguments& a, int sm_count) {
  return a.act_bits == 16 ? lut_linear_a16_workspace_bytes(a, sm_count)
                          : lut_linear_integer_workspace_bytes(a, sm_count);
}

// Bytes of counters: zeroed once, left zero by every launch. Two launches that may run at the same time (streams) need
// different ones.
inline size_t lut_linear_counter_bytes(const LutLinearArguments& a, int sm_count) {
  return a.act_bits == 16 ? lut_linear_a16_counter_bytes(a, sm_count) : lut_linear_integer_counter_bytes(a);
}

// Enqueues the launches; compute_capability is 10 * major + minor. cudaErrorInvalidValue for arguments outside the
// contract (bits, group_size, act_bits, a rotation_group that does not divide columns), else what launching returned.
inline cudaError_t lut_linear(const LutLinearArguments& a, int sm_count, int compute_capability) {
  if (a.act_bits != 16) return lut_linear_integer(a, sm_count);
  switch (a.bits) {
    case 2:
      return lut_linear_a16<2>(a, sm_count, compute_capability);
    case 3:
      return lut_linear_a16<3>(a, sm_count, compute_capability);
    case 4:
      return lut_linear_a16<4>(a, sm_count, compute_capability);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rcp::cuda
