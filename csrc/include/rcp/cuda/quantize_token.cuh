// Quantization of a token by a thread block, bit for bit as docs/numerics.md and docs/walsh.md: the steps that
// quantize_activation and the kernels of lut_linear share.
//
//   amax = max|x|                s = fl32(fl32(amax * clip) / qmax)        qmax = 7 (4 bits) or 127 (8 bits)
//   q = clamp(rint(fl32(x * fl32(1/s))), -qmax-1, qmax)                   ties to even; s < 2^-120: s = 0, q = 0
//
// A token with NaN or Inf gets the scale NaN, because a kernel cannot raise an error without a synchronisation. Every
// product with the scale is then NaN.
#pragma once

#include "rcp/cuda/ptx.cuh"
#include "rcp/cuda/values.cuh"

namespace rcp::cuda {

// 1.5 * 2^23. An integer |I| < 2^22 added to its bit pattern gives the bits of the float 12582912 + I: one subtraction
// then converts an integer sum, where I2F runs at a quarter of the rate. In the other direction, the low bits of
// x + 12582912 are rint(x), ties to even.
inline constexpr float magic = 12582912.0f;
inline constexpr int magic_bits = 0x4b400000;

// s and fl32(1/s): 0, 0 where s < 2^-120; NaN, NaN where amax is not finite.
struct TokenScale {
  float scale, reciprocal;
};

// qmax is 7 or 127, and qmax_inverse is fl32(1 / qmax). One correction step makes the product the rounded quotient:
// tests/cuda/test_ptx_lut_linear.py checks all 2^23 significands. The limit 2^-120 keeps away from subnormal numbers.
__device__ __forceinline__ TokenScale token_scale(float amax, float clip, float qmax, float qmax_inverse) {
  const float clipped = __fmul_rn(amax, clip);
  const float quotient = __fmul_rn(clipped, qmax_inverse);
  const float scale = __fmaf_rn(__fmaf_rn(-quotient, qmax, clipped), qmax_inverse, quotient);
  if (scale < 0x1p-120f) return {0.0f, 0.0f};
  // These are the instructions of __frcp_rn between 2^-126 and 2^126. Its call for other numbers cost a stack frame and
  // spills.
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  return {scale, __fmaf_rn(reciprocal, __fmaf_rn(-scale, reciprocal, 1.0f), reciprocal)};
}

// Eight values -> eight signed bytes. Without a clip below 1 no value exceeds qmax, and `clamp` may be false.
__device__ __forceinline__ uint2 quantize_chunk(const float (&x)[chunk_columns], float reciprocal, bool clamp,
                                                float qmax) {
  float rounded[chunk_columns];
#pragma unroll
  for (int i = 0; i < chunk_columns; ++i) rounded[i] = __fadd_rn(__fmul_rn(x[i], reciprocal), magic);
  if (clamp) {
#pragma unroll
    for (int i = 0; i < chunk_columns; ++i) {
      rounded[i] = fminf(fmaxf(rounded[i], magic - 1.0f - qmax), magic + qmax);
    }
  }
  const auto pair = [&](int i) {
    return ptx::permute(__float_as_uint(rounded[i]), __float_as_uint(rounded[i + 1]), 0x0040);
  };
  return {ptx::permute(pair(0), pair(2), 0x5410), ptx::permute(pair(4), pair(6), 0x5410)};
}

// The Walsh transform, in natural order, of runs of `group` (32, 64 or 128) columns of which each lane holds 8:
// butterflies of stride 1, 2 and 4 in the lane, wider ones between lanes, then the scale and a rounding to the type of
// x. All lanes of a warp take part.
__device__ __forceinline__ void rotate(float (&x)[chunk_columns], FloatType type, int group) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = __fadd_rn(a, b);
      x[i + stride] = __fsub_rn(a, b);
    }
  }
  for (int lanes = 1; lanes < group / 8; lanes *= 2) {
    const bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], lanes);
      x[i] = __fadd_rn(other, upper ? -x[i] : x[i]);
    }
  }
  const float scale = group == 32 ? 0x1.6a09e6p-3f : group == 64 ? 0.125f : 0x1.6a09e6p-4f;  // fl32(1 / sqrt(group))
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = __fmul_rn(x[i], scale);
    if (type != FloatType::float32) x[i] = two_byte_value(two_byte_bits(x[i], type), type);
  }
}

// A token that all threads of a block read: thread t takes the chunks t, t + blockDim.x, ... of `chunks`, counted from
// `first_chunk` and around the end of the token. A thread keeps its first KEPT chunks in registers. It loads and
// rotates later chunks once for the maximum and again for the rounding.
template <int KEPT>
class TokenReader {
 public:
  // Starts the loads of the kept chunks. rotation_group: 0, 32, 64 or 128.
  __device__ __forceinline__ TokenReader(const void* token, FloatType type, int64_t columns, int first_chunk,
                                         int chunks, int rotation_group)
      : token_(token),
        type_(type),
        columns_(columns),
        first_chunk_(first_chunk),
        chunks_(chunks),
        rotation_group_(rotation_group) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) raw_[i] = load(threadIdx.x + i * blockDim.x);
  }

  // The token's largest magnitude, in every thread.
  __device__ __forceinline__ float amax(uint4 (&warp_values)[2]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      finish(raw_[i], kept_[i]);
      largest = largest_magnitude(kept_[i], largest);
    }
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * blockDim.x; i < whole_warps(chunks_); i += blockDim.x) {
      float values[chunk_columns];
      finish(load(i), values);
      largest = largest_magnitude(values, largest);
    }
    return __uint_as_float(block_max(largest, warp_values));
  }

  // Calls f(i, values) for the thread's chunks i of the first `count`. All lanes of a warp call f together, so i may
  // reach the next multiple of 32.
  template <class F>
  __device__ __forceinline__ void visit(int count, const F& f) const {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int chunk = threadIdx.x + i * blockDim.x;
      if (chunk < whole_warps(count)) f(chunk, kept_[i]);
    }
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * blockDim.x; i < whole_warps(count); i += blockDim.x) {
      float values[chunk_columns];
      finish(load(i), values);
      f(i, values);
    }
  }

 private:
  static __device__ __forceinline__ int whole_warps(int count) { return (count + 31) & ~31; }
  __device__ __forceinline__ RawChunk load(int i) const {
    const int chunk = first_chunk_ + i < chunks_ ? first_chunk_ + i : first_chunk_ + i - chunks_;
    return load_chunk(token_, type_, i < chunks_ ? int64_t{chunk} * chunk_columns : columns_, columns_);
  }
  __device__ __forceinline__ void finish(const RawChunk& raw, float (&values)[chunk_columns]) const {
    widen(raw, type_, values);
    if (rotation_group_) rotate(values, type_, rotation_group_);
  }

  const void* token_;
  FloatType type_;
  int64_t columns_;
  int first_chunk_, chunks_, rotation_group_;
  RawChunk raw_[KEPT];
  float kept_[KEPT][chunk_columns];
};

}  // namespace rcp::cuda
