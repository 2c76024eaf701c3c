// Floats of any of the three types: single values, and chunks of 8 neighbouring columns of a token.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "rcp/float_types.h"

namespace rcp::cuda {

inline constexpr int chunk_columns = 8;

// The bits of the nearest bfloat16, ties to even. NaN becomes 0x7fff.
__device__ __forceinline__ uint16_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff
                                            : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
__device__ __forceinline__ uint16_t two_byte_bits(float x, FloatType type) {
  return type == FloatType::float16 ? __half_as_ushort(__float2half_rn(x)) : bfloat16_bits(x);
}
__device__ __forceinline__ float two_byte_value(uint16_t bits, FloatType type) {
  return type == FloatType::float16 ? __half2float(__ushort_as_half(bits))
                                    : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ float load_value(const void* from, FloatType type, int64_t i) {
  if (type == FloatType::float32) return __ldg(static_cast<const float*>(from) + i);
  return two_byte_value(__ldg(static_cast<const uint16_t*>(from) + i), type);
}
__device__ __forceinline__ void store_value(void* to, FloatType type, int64_t i, float value) {
  if (type == FloatType::float32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = two_byte_bits(value, type);
  }
}

// A chunk as it is in memory: 8 float32, or 8 two-byte values in the first four words. Loading and widening are apart:
// several chunks can be on their way before the first one is used.
struct RawChunk {
  uint32_t words[chunk_columns];
};

// Columns k .. k + 7 of a token of any alignment; zeros past the last column. k is a multiple of 8. Not loaded as
// constant (ld.global.nc): the previous launch may still be writing the token when this one begins (ptx::early_launch).
__device__ __forceinline__ RawChunk load_chunk(const void* token, FloatType type, int64_t k, int64_t columns) {
  RawChunk raw{};
  const bool whole = k + chunk_columns <= columns && reinterpret_cast<uintptr_t>(token) % 16 == 0;
  const auto load_vector = [&](const void* from, int i) {
    const uint4 four = static_cast<const uint4*>(from)[i];
    raw.words[4 * i] = four.x, raw.words[4 * i + 1] = four.y;
    raw.words[4 * i + 2] = four.z, raw.words[4 * i + 3] = four.w;
  };
  if (type == FloatType::float32) {
    const uint32_t* from = static_cast<const uint32_t*>(token) + k;
    if (whole) {
      load_vector(from, 0);
      load_vector(from, 1);
    } else {
#pragma unroll
      for (int i = 0; i < chunk_columns; ++i) {
        if (k + i < columns) raw.words[i] = from[i];
      }
    }
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(token) + k;
    if (whole) {
      load_vector(from, 0);
    } else {
#pragma unroll
      for (int i = 0; i < chunk_columns; ++i) {
        if (k + i < columns) raw.words[i / 2] |= static_cast<uint32_t>(from[i]) << (i % 2 * 16);
      }
    }
  }
  return raw;
}

__device__ __forceinline__ void widen(const RawChunk& raw, FloatType type, float (&values)[chunk_columns]) {
  const auto each = [&](const auto& value) {
#pragma unroll
    for (int i = 0; i < chunk_columns; ++i) values[i] = value(i);
  };
  const auto half = [&](int i) { return static_cast<uint16_t>(raw.words[i / 2] >> (i % 2 * 16)); };
  if (type == FloatType::float32) {
    each([&](int i) { return __uint_as_float(raw.words[i]); });
  } else if (type == FloatType::float16) {
    each([&](int i) { return two_byte_value(half(i), FloatType::float16); });
  } else {
    each([&](int i) { return two_byte_value(half(i), FloatType::bfloat16); });
  }
}

// The inverse of load_chunk and widen: rounds the values to the type of the row, and stores those that exist.
__device__ __forceinline__ void store_chunk(void* row, FloatType type, int64_t k, int64_t columns,
                                            const float (&values)[chunk_columns]) {
  if (k + chunk_columns > columns || reinterpret_cast<uintptr_t>(row) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < chunk_columns; ++i) {
      if (k + i < columns) store_value(row, type, k + i, values[i]);
    }
  } else if (type == FloatType::float32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(row) + k);
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[1] = make_float4(values[4], values[5], values[6], values[7]);
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = two_byte_bits(values[2 * i], type) | static_cast<uint32_t>(two_byte_bits(values[2 * i + 1], type))
                                                          << 16;
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(row) + k) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// The larger of `largest` and the magnitudes of a chunk, as the bits of a float. Bits of magnitudes order like floats,
// and those of Inf and NaN are the largest.
__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[chunk_columns], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < chunk_columns; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
  return largest;
}

// RCP_NO_REDUX: for simulators of PTX that do not know redux.sync (examples/cuda).
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800 && !defined(RCP_NO_REDUX)
  return __reduce_max_sync(0xffffffffu, value);
#else
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
#endif
}

// The maximum over a block of at most 8 warps, in every thread. Waits for all of them.
__device__ __forceinline__ uint32_t block_max(uint32_t value, uint4 (&warp_values)[2]) {
  auto* words = reinterpret_cast<uint32_t*>(warp_values);
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = value;
  if (threadIdx.x < 8 && threadIdx.x >= blockDim.x / 32) words[threadIdx.x] = 0;
  __syncthreads();
  // Two loads instead of a loop over the warps, whose loads would wait for each other.
  const uint4 a = warp_values[0], b = warp_values[1];
  return max(max(max(a.x, a.y), max(a.z, a.w)), max(max(b.x, b.y), max(b.z, b.w)));
}

}  // namespace rcp::cuda
