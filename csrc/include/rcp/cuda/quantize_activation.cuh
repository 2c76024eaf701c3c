// Per-token symmetric activation quantization for CUDA, bit-equal to the CPU's. The steps are in quantize_token.cuh. A
// token with NaN or Inf gets the scale NaN and q = 0.
//
// One block for each token. A thread keeps up to 4 chunks in registers between the two passes, so a token of at most
// 8192 values is read once; the rest of a longer token is read again, from L2. x and q may have any alignment: a chunk
// that is not aligned, or not whole, is loaded and stored value by value.
#pragma once

#include "rcp/cuda/quantize_token.cuh"

namespace rcp::cuda {

struct QuantizeActivationCall {
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

inline constexpr int quantize_activation_threads = 256, quantize_activation_kept_chunks = 4;

template <bool PACKED>
__global__ void __launch_bounds__(quantize_activation_threads)
    quantize_activation_kernel(const QuantizeActivationCall call) {
  __shared__ uint4 warp_values[2];
  const int64_t columns = call.columns, token = blockIdx.x;
  const int chunks = static_cast<int>((columns + chunk_columns - 1) / chunk_columns);
  const char* x = static_cast<const char*>(call.x) + token * columns * (call.x_type == FloatType::float32 ? 4 : 2);
  uint8_t* q = static_cast<uint8_t*>(call.q) + token * (PACKED ? (columns + 1) / 2 : columns);
  const bool aligned = reinterpret_cast<uintptr_t>(q) % (PACKED ? sizeof(uint32_t) : sizeof(uint2)) == 0;
  const float qmax = call.bits == 4 ? 7.0f : 127.0f;

  TokenReader<quantize_activation_kept_chunks> reader(x, call.x_type, columns, 0, chunks, 0);
  const float amax = reader.amax(warp_values);
  const bool finite = __float_as_uint(amax) < 0x7f800000u;
  const TokenScale scale = token_scale(amax, call.clip, qmax, call.bits == 4 ? 1.0f / 7.0f : 1.0f / 127.0f);
  if (threadIdx.x == 0) call.scale[token] = scale.scale;
  reader.visit(chunks, [&](int chunk, const float (&values)[chunk_columns]) {
    const int64_t k = int64_t{chunk} * chunk_columns;
    const uint2 bytes = finite ? quantize_chunk(values, scale.reciprocal, call.clip < 1.0f, qmax) : uint2{0, 0};
    const bool whole = aligned && k + chunk_columns <= columns;
    if constexpr (PACKED) {
      // Bytes 0x0a, 0x0b, ... -> nibbles.
      const auto pack = [](uint32_t four) {
        four = (four & 0x0f0f0f0fu) | (four >> 4 & 0x00f000f0u);
        return (four & 0xffu) | (four >> 8 & 0xff00u);
      };
      const uint32_t nibbles = pack(bytes.x) | pack(bytes.y) << 16;
      if (whole) {
        *reinterpret_cast<uint32_t*>(q + k / 2) = nibbles;
      } else {
#pragma unroll
        for (int i = 0; i < chunk_columns; i += 2) {
          if (k + i < columns) q[(k + i) / 2] = static_cast<uint8_t>(nibbles >> (4 * i));
        }
      }
    } else if (whole) {
      *reinterpret_cast<uint2*>(q + k) = bytes;
    } else {
#pragma unroll
      for (int i = 0; i < chunk_columns; ++i) {
        if (k + i < columns) q[k + i] = static_cast<uint8_t>((i < 4 ? bytes.x : bytes.y) >> (i % 4 * 8));
      }
    }
  });
}

// Enqueues one launch. Without tokens nothing is launched. Tokens without columns get the scale 0.
inline cudaError_t quantize_activation(const QuantizeActivationCall& call) {
  if (call.tokens < 1) return cudaSuccess;
  if (call.tokens > 0x7fffffff || call.columns > int64_t{1} << 33 || (call.bits != 4 && call.bits != 8) ||
      (call.packed && call.bits != 4)) {
    return cudaErrorInvalidValue;
  }
  const int64_t warps = (call.columns + 32 * chunk_columns - 1) / (32 * chunk_columns);
  const unsigned threads = 32u * static_cast<unsigned>(warps < 1 ? 1 : warps > 8 ? 8 : warps);
  const auto kernel = call.packed ? quantize_activation_kernel<true> : quantize_activation_kernel<false>;
  kernel<<<static_cast<unsigned>(call.tokens), threads, 0, call.stream>>>(call);
  return cudaGetLastError();
}

}  // namespace rcp::cuda
