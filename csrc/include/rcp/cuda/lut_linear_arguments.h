// What the CUDA launchers of lut_linear take: raw device pointers and a stream, nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "rcp/float_types.h"

namespace rcp {
namespace cuda {

// y = lut_linear(x, weight) + bias, as docs/numerics.md. All pointers are device memory; nothing is allocated,
// synchronised or kept.
struct LutLinearArguments {
  const uint8_t* weight;  // blob of lut_linear_cuda_layout.h, 16-byte aligned
  const void* x;          // [tokens, columns], contiguous, of x_type; any alignment of its element
  FloatType x_type;       // also the type of y
  const void* bias;       // [rows] of bias_type, or nullptr
  FloatType bias_type;
  void* y;  // [tokens, rows] of x_type
  int64_t tokens, rows, columns;
  int bits, group_size, act_bits;  // 2, 3, 4; 32, 64, 128 or columns; 4, 8, 16
  float clip;                      // of the activations' maximum, act_bits 4 and 8 only
  int rotation_group;              // 0: none; 32, 64, 128: orthonormal Walsh transform of each run of that many columns
  bool rotation_sequency;          // rows of the transform in sequency order, else in natural order
  void* workspace;                 // lut_linear_workspace_bytes(), 16-byte aligned, contents arbitrary
  void* counters;                  // lut_linear_counter_bytes(), zeroed once by the caller; every launch leaves zeros
  cudaStream_t stream;
};

}  // namespace cuda
}  // namespace rcp
