// Activations of the integer kernels of lut_linear: reading x of any type and alignment, the per-token scale, rounding,
// and the group-local Walsh rotation, all as docs/numerics.md and docs/walsh.md have it, bit for bit.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp::cuda::activation {

// Eight consecutive columns: what one lane reads, rotates, rounds and stores at a time.
inline constexpr int piece_columns = 8, unit_pieces = unit_columns / piece_columns;

template <FloatType TYPE>
struct Raw {
  static constexpr int words = TYPE == FloatType::float32 ? 8 : 4;
  uint32_t word[words];

  __device__ __forceinline__ float value(int i) const {
    if constexpr (TYPE == FloatType::float32) {
      return __uint_as_float(word[i]);
    } else if constexpr (TYPE == FloatType::float16) {
      const __half2 pair = *reinterpret_cast<const __half2*>(&word[i / 2]);
      return i % 2 ? __high2float(pair) : __low2float(pair);
    } else {
      return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    }
  }
};

// Piece p + more of a token that is 16-byte aligned and has all its columns.
template <FloatType TYPE>
__device__ __forceinline__ Raw<TYPE> load_whole_piece(const void* token, unsigned piece, unsigned more = 0) {
  Raw<TYPE> raw;
  const uint4* at = static_cast<const uint4*>(token) + piece * (Raw<TYPE>::words / 4) + more * (Raw<TYPE>::words / 4);
#pragma unroll
  for (int i = 0; i < Raw<TYPE>::words; i += 4) {
    const uint4 four = __ldg(at + i / 4);
    raw.word[i] = four.x, raw.word[i + 1] = four.y, raw.word[i + 2] = four.z, raw.word[i + 3] = four.w;
  }
  return raw;
}

// Piece p of any token of any type, widened; zeros past its columns.
__device__ __forceinline__ void load_piece(const void* token, FloatType type, int piece, int columns,
                                           float (&x)[piece_columns]) {
  const int first = piece * piece_columns;
  const bool whole = reinterpret_cast<uintptr_t>(token) % 16 == 0 && first + piece_columns <= columns;
  const auto widen_all = [&](const auto& raw) {
#pragma unroll
    for (int i = 0; i < piece_columns; ++i) x[i] = raw.value(i);
  };
  if (type == FloatType::float32) {
    Raw<FloatType::float32> raw{};
    if (whole) {
      raw = load_whole_piece<FloatType::float32>(token, static_cast<unsigned>(piece));
    } else {
#pragma unroll
      for (int i = 0; i < piece_columns; ++i) {
        if (first + i < columns) raw.word[i] = __ldg(static_cast<const uint32_t*>(token) + first + i);
      }
    }
    widen_all(raw);
    return;
  }
  Raw<FloatType::float16> raw{};
  if (whole) {
    raw = load_whole_piece<FloatType::float16>(token, static_cast<unsigned>(piece));
  } else {
#pragma unroll
    for (int i = 0; i < piece_columns; ++i) {
      if (first + i < columns) {
        const uint32_t half = __ldg(static_cast<const uint16_t*>(token) + first + i);
        raw.word[i / 2] |= half << (i % 2 * 16);
      }
    }
  }
  if (type == FloatType::float16) {
    widen_all(raw);
  } else {
    Raw<FloatType::bfloat16> wide{};
#pragma unroll
    for (int i = 0; i < 4; ++i) wide.word[i] = raw.word[i];
    widen_all(wide);
  }
}

// Magnitudes are compared as the integers of their bits, where NaN and Inf are the largest, so that a token that has
// one gets a scale that is not finite.
//
// The two-byte types in pairs: one instruction per two values, which takes the magnitudes and keeps NaN.
template <FloatType TYPE>
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b) {
  static_assert(TYPE != FloatType::float32);
  uint32_t d;
#if __CUDA_ARCH__ >= 800
  if constexpr (TYPE == FloatType::float16) {
    asm("{.reg .b32 m, n; abs.f16x2 m, %1; abs.f16x2 n, %2; max.NaN.f16x2 %0, m, n;}" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("{.reg .b32 m, n; abs.bf16x2 m, %1; abs.bf16x2 n, %2; max.NaN.bf16x2 %0, m, n;}" : "=r"(d) : "r"(a), "r"(b));
  }
#else
  d = __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
  return d;
}

// Maximum of two pieces; float32: bits of the value, else the bits of two values, each of half of the columns.
template <FloatType TYPE>
__device__ __forceinline__ uint32_t largest_of(const Raw<TYPE>& a, const Raw<TYPE>& b) {
  const auto larger = [](uint32_t one, uint32_t other) {
    if constexpr (TYPE == FloatType::float32) {
      return max(one & 0x7fffffffu, other & 0x7fffffffu);
    } else {
      return max_pairs<TYPE>(one, other);
    }
  };
  uint32_t largest = larger(a.word[0], b.word[0]);
#pragma unroll
  for (int i = 1; i < Raw<TYPE>::words; ++i) largest = larger(larger(largest, a.word[i]), b.word[i]);
  return largest;
}

__device__ __forceinline__ uint32_t largest_of(const float (&x)[piece_columns], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < piece_columns; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
  return largest;
}

// redux.sync where it exists, but not for float32: the kernels of that type keep to instructions that any simulator of
// PTX knows.
template <FloatType TYPE, int LANES = 32>
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  if constexpr (TYPE != FloatType::float32) return __reduce_max_sync(0xffffffffu, value);
#endif
  constexpr int most = LANES / 2;
#pragma unroll
  for (int lanes = most; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// The larger of a pair of magnitudes, in both halves: as an integer, it orders as either half does.
template <FloatType TYPE>
__device__ __forceinline__ uint32_t fold_pairs(uint32_t largest) {
  if constexpr (TYPE == FloatType::float32) {
    return largest;
  } else {
    // Not permute(): what the compiler moves itself, it makes the maximum's own choice of halves.
    uint32_t low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; mov.b32 %0, {l, l}; mov.b32 %1, {h, h};}"
        : "=r"(low), "=r"(high)
        : "r"(largest));
    return max_pairs<TYPE>(low, high);
  }
}
// The low half, or float32, as a float.
template <FloatType TYPE>
__device__ __forceinline__ float widen(uint32_t bits) {
  if constexpr (TYPE == FloatType::float32) return __uint_as_float(bits);
  if constexpr (TYPE == FloatType::float16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return __uint_as_float(bits << 16);
}

// The maximum over a block of 8 warps, in every thread; of the two-byte types, at least their smallest number above
// zero, so that a token of zeros needs no care. Words of shared memory: 32 zeros, which stay, 32 ones, the warps'.
inline constexpr int block_max_words = 72;

__device__ __forceinline__ void prepare_block_max(uint32_t* words) {
  if (threadIdx.x < 64) words[threadIdx.x] = threadIdx.x / 32;
}
template <FloatType TYPE>
__device__ __forceinline__ float block_max(uint32_t largest, uint32_t* words, int warp, int lane) {
  words[64 + warp] = warp_max<TYPE>(fold_pairs<TYPE>(largest));  // all lanes store the same
  __syncthreads();
  if constexpr (TYPE == FloatType::float32) return __uint_as_float(warp_max<TYPE, 8>(words[64 + lane % 8]));
  return widen<TYPE>(warp_max<TYPE>(words[40 + lane]));
}

// scale s and its reciprocal r; 0, 0 below 2^-120; NaN where amax is not finite.
struct TokenScale {
  float scale, reciprocal;
};
// qmax is 7 or 127; `inverse` = fl32(1 / qmax). One correction step makes the product the rounded quotient: checked for
// all 2^24 significands of both (tests/cuda/test_ptx_lut_linear.py), and 0x1p-120 keeps away from subnormal numbers.
__device__ __forceinline__ TokenScale token_scale(float amax, float clip, float qmax, float inverse) {
  const float clipped = __fmul_rn(amax, clip);
  const float quotient = __fmul_rn(clipped, inverse);
  const float scale = __fmaf_rn(__fmaf_rn(-quotient, qmax, clipped), inverse, quotient);
  if (scale < 0x1p-120f) return {0.0f, 0.0f};
  // fl32(1 / scale): what __frcp_rn does between 2^-126 and 2^126, without its call for the other numbers, which cost a
  // stack frame and spills.
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  return {scale, __fmaf_rn(reciprocal, __fmaf_rn(-scale, reciprocal, 1.0f), reciprocal)};
}

// For float16 and clip = 1, with fewer instructions. amax is at least 2^-24, so that s, its reciprocal and what they
// are made of stay normal numbers: of a token of zeros too, whose scale is then not 0, which its zeros hide.
// inverse_high + inverse_low = 1 / qmax to 48 bits, high rounded up: their products' sum is the rounded quotient, since
// a quotient by 7 or 127 is never closer to a rounding boundary than 1 / 254 of a last place (checked as above).
// inverse_low is negative, so that an infinite maximum gives NaN.
__device__ __forceinline__ TokenScale half_token_scale(float amax, float inverse_high, float inverse_low) {
  const float scale = __fmaf_rn(amax, inverse_high, __fmul_rn(amax, inverse_low));
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
  return {scale, __fmaf_rn(reciprocal, __fmaf_rn(-scale, reciprocal, 1.0f), reciprocal)};
}

// That of a token of which each thread of a block of 8 warps has two pieces, not clipped.
template <FloatType TYPE>
__device__ __forceinline__ TokenScale scale_of_two(const Raw<TYPE>& low, const Raw<TYPE>& high, uint32_t* words,
                                                   int warp, int lane, float qmax, float inverse, float inverse_high,
                                                   float inverse_low) {
  const float amax = block_max<TYPE>(largest_of<TYPE>(low, high), words, warp, lane);
  if constexpr (TYPE == FloatType::float16) return half_token_scale(amax, inverse_high, inverse_low);
  return token_scale(amax, 1.0f, qmax, inverse);
}

// Four values -> four signed bytes.
__device__ __forceinline__ uint32_t round_four(const float (&x)[4], float reciprocal, bool clamp, float qmax) {
  float rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = __fadd_rn(__fmul_rn(x[i], reciprocal), fragments::magic);
  if (clamp) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rounded[i] = fminf(fmaxf(rounded[i], fragments::magic - 1.0f - qmax), fragments::magic + qmax);
    }
  }
  return fragments::permute(fragments::permute(__float_as_uint(rounded[0]), __float_as_uint(rounded[1]), 0x0040),
                            fragments::permute(__float_as_uint(rounded[2]), __float_as_uint(rounded[3]), 0x0040),
                            0x5410);
}
__device__ __forceinline__ uint2 round_piece(const float (&x)[piece_columns], float reciprocal, bool clamp,
                                             float qmax) {
  const float low[4] = {x[0], x[1], x[2], x[3]}, high[4] = {x[4], x[5], x[6], x[7]};
  return {round_four(low, reciprocal, clamp, qmax), round_four(high, reciprocal, clamp, qmax)};
}
template <FloatType TYPE>
__device__ __forceinline__ uint2 round_piece(const Raw<TYPE>& raw, float reciprocal, float qmax) {
  float x[piece_columns];
#pragma unroll
  for (int i = 0; i < piece_columns; ++i) x[i] = raw.value(i);
  return round_piece(x, reciprocal, false, qmax);
}

// Where the 8 bytes of piece p belong, in sub-blocks of 128 bytes [q][s][h][j].
template <int SLOT>
__device__ __forceinline__ int piece_offset(int piece) {
  if constexpr (SLOT == 32) return (piece / 16 * 16 + piece % 4 * 4 + piece / 4 % 4) * 8;
  if constexpr (SLOT == 64) return (piece / 16 * 16 + piece / 2 % 4 * 4 + piece / 8 % 2 * 2 + piece % 2) * 8;
  return piece * 8;
}

// Bits of the nearest bfloat16, ties to even; NaN stays one.
__device__ __forceinline__ uint16_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff
                                            : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ float rounded_to(FloatType type, float x) {
  if (type == FloatType::float16) return __half2float(__float2half_rn(x));
  if (type == FloatType::bfloat16) return __uint_as_float(static_cast<uint32_t>(bfloat16_bits(x)) << 16);
  return x;
}

// The Walsh transform of runs of `group` (32, 64, 128) columns of which each lane holds 8: butterflies of stride 1, 2,
// 4 in the lane, the others between lanes, then the scale and a rounding to the type of x. Natural order.
__device__ __forceinline__ void rotate(float (&x)[piece_columns], FloatType type, int group) {
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
  // fl32(1 / sqrt(group))
  const float scale = group == 32 ? 0x1.6a09e6p-3f : group == 64 ? 0.125f : 0x1.6a09e6p-4f;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = rounded_to(type, __fmul_rn(x[i], scale));
}

// Where row `natural` of Sylvester's matrix of order 2^bits stands among the rows sorted by sign changes: the Gray code
// of its bit reversal, decoded.
__device__ __forceinline__ int sequency_of(int natural, int bits) {
  unsigned s = __brev(static_cast<unsigned>(natural)) >> (32 - bits);
  s ^= s >> 1;
  s ^= s >> 2;
  s ^= s >> 4;
  return static_cast<int>(s);
}

__device__ __forceinline__ float load_float(const void* at, FloatType type, int64_t i) {
  if (type == FloatType::float32) return __ldg(static_cast<const float*>(at) + i);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(at) + i);
  return type == FloatType::float16 ? widen<FloatType::float16>(bits) : widen<FloatType::bfloat16>(bits);
}
__device__ __forceinline__ void store_float(void* at, FloatType type, int64_t i, float value) {
  if (type == FloatType::float32) {
    static_cast<float*>(at)[i] = value;
  } else if (type == FloatType::float16) {
    static_cast<__half*>(at)[i] = __float2half_rn(value);
  } else {
    static_cast<uint16_t*>(at)[i] = bfloat16_bits(value);
  }
}

}  // namespace rcp::cuda::activation
