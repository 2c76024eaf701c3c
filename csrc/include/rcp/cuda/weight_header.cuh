// The header of a blob, read on the device. A kernel cannot raise an error, so a wrong header gives NaN.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda {

// The magic as two words: device code cannot index the array itself.
constexpr uint32_t weight_magic_word(int first) {
  return static_cast<uint32_t>(weight_magic[first]) | static_cast<uint32_t>(weight_magic[first + 1]) << 8 |
         static_cast<uint32_t>(weight_magic[first + 2]) << 16 | static_cast<uint32_t>(weight_magic[first + 3]) << 24;
}
inline constexpr uint32_t weight_magic_low = weight_magic_word(0), weight_magic_high = weight_magic_word(4);

// The tensor scale, from the first 16 bytes of the blob; NaN if the magic or the shape hash is wrong.
__device__ __forceinline__ float header_tensor_scale(const uint4& first, uint32_t shape_hash) {
  const bool known = first.x == weight_magic_low && first.y == weight_magic_high && first.z == shape_hash;
  return known ? __uint_as_float(first.w) : __uint_as_float(0x7fffffffu);
}

// Compares every field as well. For kernels that have registers to spare.
__device__ __forceinline__ float header_tensor_scale(const uint8_t* blob, const CudaLayout& layout) {
  const uint4 first = __ldg(reinterpret_cast<const uint4*>(blob));
  const uint4 second = __ldg(reinterpret_cast<const uint4*>(blob) + 1);
  const int2 third = __ldg(reinterpret_cast<const int2*>(blob) + 4);
  const bool same = second.x == static_cast<uint32_t>(layout.bits) &&
                    second.y == static_cast<uint32_t>(layout.group_size) &&
                    second.z == static_cast<uint32_t>(layout.rows) && third.x == static_cast<int>(layout.columns);
  return same ? header_tensor_scale(first, layout.shape_hash()) : __uint_as_float(0x7fffffffu);
}

}  // namespace rcp::cuda
