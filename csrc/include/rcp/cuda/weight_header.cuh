// The device's look at a blob's header: a kernel cannot refuse a wrong one, but it can answer NaN.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda {

// The magic as the two words that a device compares; a device cannot index the array itself.
constexpr uint32_t weight_magic_word(int first) {
  return static_cast<uint32_t>(weight_magic[first]) | static_cast<uint32_t>(weight_magic[first + 1]) << 8 |
         static_cast<uint32_t>(weight_magic[first + 2]) << 16 | static_cast<uint32_t>(weight_magic[first + 3]) << 24;
}
inline constexpr uint32_t weight_magic_low = weight_magic_word(0), weight_magic_high = weight_magic_word(4);

// The blob's tensor scale, from its first 16 bytes; NaN where its magic or stamp is another.
__device__ __forceinline__ float header_tensor_scale(const uint4& first, uint32_t stamp) {
  const bool known = first.x == weight_magic_low && first.y == weight_magic_high && first.z == stamp;
  return known ? __uint_as_float(first.w) : __uint_as_float(0x7fffffffu);
}

// As above, and every field is looked at: for kernels that have the registers for it.
__device__ __forceinline__ float header_tensor_scale(const uint8_t* blob, int bits, int64_t group_size, int64_t rows,
                                                     int64_t columns) {
  const uint4 first = __ldg(reinterpret_cast<const uint4*>(blob));
  const uint4 second = __ldg(reinterpret_cast<const uint4*>(blob) + 1);
  const int2 third = __ldg(reinterpret_cast<const int2*>(blob) + 4);
  const bool same = second.x == static_cast<uint32_t>(bits) && second.y == static_cast<uint32_t>(group_size) &&
                    second.z == static_cast<uint32_t>(rows) && third.x == static_cast<int>(columns);
  const float scale = header_tensor_scale(first, CudaLayout{rows, columns, group_size, bits}.stamp());
  return same ? scale : __uint_as_float(0x7fffffffu);
}

}  // namespace rcp::cuda
