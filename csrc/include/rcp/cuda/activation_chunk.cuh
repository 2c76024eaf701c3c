// Eight values of a token at a time, of any type and alignment, and their largest magnitude.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rcp::cuda {

constexpr int chunk_values = 8;

inline __device__ float widen(float x) {
  return x;
}
inline __device__ float widen(__half x) {
  return __half2float(x);
}
inline __device__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Eight values at a 16-byte boundary.
template <class T>
__device__ __forceinline__ void load_whole_chunk(const T* from, float (&values)[chunk_values]) {
  constexpr int vectors = sizeof(T) * chunk_values / sizeof(uint4), per_vector = chunk_values / vectors;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from) + v);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < per_vector; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[v * per_vector + i] = __uint_as_float(words[i]);
      } else {
        const unsigned short half = static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)));
        values[v * per_vector + i] = widen(*reinterpret_cast<const T*>(&half));
      }
    }
  }
}

// Values k .. k + 7 of a token of any alignment, zeros past its end.
template <class T>
__device__ __forceinline__ void load_partial_chunk(const T* token, int64_t k, int64_t columns,
                                                   float (&values)[chunk_values]) {
  const int left = static_cast<int>(min(columns - k, static_cast<int64_t>(chunk_values)));
#pragma unroll
  for (int i = 0; i < chunk_values; ++i) values[i] = i < left ? widen(token[k + i]) : 0.0f;
}

__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[chunk_values], uint32_t largest) {
  // As integers, magnitudes order like floats, and Inf and NaN are the largest.
#pragma unroll
  for (int i = 0; i < chunk_values; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
  return largest;
}

inline __device__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int offset = 16; offset; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
#endif
}

}  // namespace rcp::cuda
