// Per-token symmetric activation quantization for CUDA: the steps of docs/numerics.md, bit-equal to the CPU's.
//
//   amax = max|x|                s = fl32(fl32(amax * clip) / qmax)        qmax = 7 (4 bits) or 127 (8 bits)
//   q = clamp(rint(fl32(x * fl32(1/s))), -qmax-1, qmax)                   ties to even; s < 2^-120: s = 0, q = 0
//
// A token with NaN or Inf gets the scale NaN and q = 0: a kernel cannot raise without a synchronisation, and a scale of
// NaN makes every use of the token NaN.
//
// One block per token. Up to 4 chunks of 8 values a thread stay in registers between the two passes, so a token of at
// most 8192 values is read once; of a longer one the rest is read again, from L2. Any alignment of x and q: a chunk
// that is not aligned, or not whole, is loaded and stored value by value.
#pragma once

#include <cuda_runtime.h>

#include "rcp/cuda/activation_chunk.cuh"
#include "rcp/float_types.h"

namespace rcp::cuda {

struct QuantizeActivationArguments {
  const void* x;  // [tokens, columns], contiguous, any element alignment
  FloatType x_type;
  int64_t tokens, columns;
  int bits;     // 4 or 8
  bool packed;  // 4 bits only: two values a byte, even column in the low nibble
  float clip;
  void* q;       // int8 [tokens, columns] or uint8 [tokens, ceil(columns / 2)]
  float* scale;  // [tokens]
  cudaStream_t stream;
};

namespace quantize_activation_detail {

constexpr int cached_chunks = 4, max_threads = 256;

__device__ __forceinline__ void store_chunk(uint8_t* token_q, int64_t k, int64_t columns, bool aligned, bool packed,
                                            const float (&values)[chunk_values], float inverse, int qmax) {
  uint32_t q[chunk_values];
#pragma unroll
  for (int i = 0; i < chunk_values; ++i) {
    // The conversion turns NaN to 0 and saturates, so a token without a finite scale (inverse = 0) becomes zeros.
    q[i] = static_cast<uint32_t>(max(-qmax - 1, min(qmax, __float2int_rn(__fmul_rn(values[i], inverse)))));
  }
  if (packed) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < chunk_values; ++i) word |= (q[i] & 15u) << (4 * i);
    if (aligned && k + chunk_values <= columns) {
      *reinterpret_cast<uint32_t*>(token_q + k / 2) = word;
    } else {
#pragma unroll
      for (int i = 0; i < chunk_values; i += 2) {
        if (k + i < columns) token_q[(k + i) / 2] = static_cast<uint8_t>(word >> (4 * i));
      }
    }
    return;
  }
  if (aligned && k + chunk_values <= columns) {
    uint2 words;
    words.x = (q[0] & 255u) | (q[1] & 255u) << 8 | (q[2] & 255u) << 16 | q[3] << 24;
    words.y = (q[4] & 255u) | (q[5] & 255u) << 8 | (q[6] & 255u) << 16 | q[7] << 24;
    *reinterpret_cast<uint2*>(token_q + k) = words;
  } else {
#pragma unroll
    for (int i = 0; i < chunk_values; ++i) {
      if (k + i < columns) token_q[k + i] = static_cast<uint8_t>(q[i]);
    }
  }
}

}  // namespace quantize_activation_detail

template <class T>
__global__ void __launch_bounds__(quantize_activation_detail::max_threads)
    quantize_activation_kernel(const T* __restrict__ x, int64_t columns, int qmax, bool packed, float clip,
                               uint8_t* __restrict__ q, float* __restrict__ scale) {
  namespace detail = quantize_activation_detail;
  __shared__ uint32_t warp_largest[detail::max_threads / 32];
  const T* token = x + blockIdx.x * columns;
  uint8_t* token_q = q + blockIdx.x * (packed ? (columns + 1) / 2 : columns);
  const bool aligned_x = reinterpret_cast<uintptr_t>(token) % sizeof(uint4) == 0;
  const auto load_chunk = [&](int64_t k, float (&values)[chunk_values]) {
    if (aligned_x && k + chunk_values <= columns) {
      load_whole_chunk(token + k, values);
    } else {
      load_partial_chunk(token, k, columns, values);
    }
  };
  const bool aligned_q = reinterpret_cast<uintptr_t>(token_q) % (packed ? sizeof(uint32_t) : sizeof(uint2)) == 0;
  const int64_t first = threadIdx.x * chunk_values, stride = blockDim.x * chunk_values;

  float cached[detail::cached_chunks][chunk_values];
  uint32_t largest = 0;
#pragma unroll
  for (int c = 0; c < detail::cached_chunks; ++c) {
    if (first + c * stride < columns) {
      load_chunk(first + c * stride, cached[c]);
      largest = largest_magnitude(cached[c], largest);
    }
  }
  for (int64_t k = first + detail::cached_chunks * stride; k < columns; k += stride) {
    float values[chunk_values];
    load_chunk(k, values);
    largest = largest_magnitude(values, largest);
  }
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) largest = max(largest, warp_largest[warp]);

  float s = __fdiv_rn(__fmul_rn(__uint_as_float(largest), clip), static_cast<float>(qmax));
  float inverse = 0.0f;
  if (largest >= 0x7f800000u) {
    s = __uint_as_float(0x7fffffffu);
  } else if (s < 0x1p-120f) {
    s = 0.0f;
  } else {
    inverse = __frcp_rn(s);
  }
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
  for (int c = 0; c < detail::cached_chunks; ++c) {
    if (first + c * stride < columns) {
      detail::store_chunk(token_q, first + c * stride, columns, aligned_q, packed, cached[c], inverse, qmax);
    }
  }
  for (int64_t k = first + detail::cached_chunks * stride; k < columns; k += stride) {
    float values[chunk_values];
    load_chunk(k, values);
    detail::store_chunk(token_q, k, columns, aligned_q, packed, values, inverse, qmax);
  }
}

// Enqueues one launch; empty input launches nothing but the zero scales of tokens without columns.
inline cudaError_t quantize_activation(const QuantizeActivationArguments& a) {
  if (a.tokens < 1) return cudaSuccess;
  if (a.tokens > 0x7fffffff || (a.bits != 4 && a.bits != 8) || (a.packed && a.bits != 4)) return cudaErrorInvalidValue;
  namespace detail = quantize_activation_detail;
  const int64_t chunks = (a.columns + chunk_values - 1) / chunk_values;
  const int64_t warps = (chunks + 31) / 32;
  const unsigned threads = warps >= detail::max_threads / 32 ? detail::max_threads : 32u * (warps < 1 ? 1 : warps);
  const unsigned blocks = static_cast<unsigned>(a.tokens);
  const int qmax = a.bits == 4 ? 7 : 127;
  auto* q = static_cast<uint8_t*>(a.q);
  switch (a.x_type) {
    case FloatType::float32:
      quantize_activation_kernel<<<blocks, threads, 0, a.stream>>>(static_cast<const float*>(a.x), a.columns, qmax,
                                                                   a.packed, a.clip, q, a.scale);
      break;
    case FloatType::float16:
      quantize_activation_kernel<<<blocks, threads, 0, a.stream>>>(static_cast<const __half*>(a.x), a.columns, qmax,
                                                                   a.packed, a.clip, q, a.scale);
      break;
    case FloatType::bfloat16:
      quantize_activation_kernel<<<blocks, threads, 0, a.stream>>>(static_cast<const __nv_bfloat16*>(a.x), a.columns,
                                                                   qmax, a.packed, a.clip, q, a.scale);
      break;
  }
  return cudaGetLastError();
}

}  // namespace rcp::cuda
