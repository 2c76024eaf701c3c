// The names of lanes_scalar.h for eight lanes; also fused multiply-adds, and loads and stores of all float types.
#pragma once

#include <cstdint>
#include <cstring>

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp::avx2::lanes {

inline constexpr int64_t count = 8;

using Vector = __m256;
using Mask = __m256;
struct Wide {
  __m256d low, high;
};

// Elements [i, i + 8) of any of the three types as float32.
template <FloatType TYPE>
RCP_AVX2 RCP_INLINE Vector load(const void* x, int64_t i) {
  if constexpr (TYPE == FloatType::float32) {
    return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  } else {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
    if constexpr (TYPE == FloatType::float16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
}

template <FloatType TYPE>
RCP_AVX2 RCP_INLINE void store(void* y, int64_t i, Vector value) {
  if constexpr (TYPE == FloatType::float32) {
    _mm256_storeu_ps(static_cast<float*>(y) + i, value);
  } else {
    __m128i raw;
    if constexpr (TYPE == FloatType::float16) {
      raw = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      rounded = _mm256_blendv_epi8(rounded, quiet, nan);
      raw = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + i), raw);
  }
}

// The last n < 8 elements; the other lanes are 0. By a copy: AVX2 has no masked 16-bit load.
template <FloatType TYPE>
RCP_AVX2 inline Vector load_tail(const void* x, int64_t i, int64_t n) {
  alignas(32) unsigned char copy[32] = {};
  std::memcpy(copy, advance(x, TYPE, i), static_cast<std::size_t>(n) * float_size(TYPE));
  return load<TYPE>(copy, 0);
}
RCP_AVX2 RCP_INLINE Vector load(const float* x) {
  return _mm256_loadu_ps(x);
}
RCP_AVX2 RCP_INLINE void store(float* x, Vector v) {
  _mm256_storeu_ps(x, v);
}
RCP_AVX2 RCP_INLINE void store_bytes(uint8_t* x, Vector v) {
  const __m256i integers = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_packus_epi16(words, words));
}
RCP_AVX2 RCP_INLINE Vector set1(float x) {
  return _mm256_set1_ps(x);
}
RCP_AVX2 RCP_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm256_fmadd_ps(a, b, c);
}
RCP_AVX2 RCP_INLINE Vector min(Vector a, Vector b) {
  return _mm256_min_ps(a, b);
}
RCP_AVX2 RCP_INLINE Vector max(Vector a, Vector b) {
  return _mm256_max_ps(a, b);
}
RCP_AVX2 RCP_INLINE Mask greater(Vector a, Vector b) {
  return _mm256_cmp_ps(a, b, _CMP_GT_OQ);
}
RCP_AVX2 RCP_INLINE Vector select(Mask mask, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, mask);
}
RCP_AVX2 RCP_INLINE Vector round_even(Vector a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RCP_AVX2 RCP_INLINE Wide widen(Vector a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
RCP_AVX2 RCP_INLINE Wide operator+(Wide a, Wide b) {
  return {a.low + b.low, a.high + b.high};
}
RCP_AVX2 RCP_INLINE Wide operator*(Wide a, Wide b) {
  return {a.low * b.low, a.high * b.high};
}
RCP_AVX2 RCP_INLINE Mask wide_less(Wide a, Wide b) {
  // The lower half of each 64-bit truth value is all ones or all zeros, as the whole is.
  const __m256 low = _mm256_castpd_ps(_mm256_cmp_pd(a.low, b.low, _CMP_LT_OQ));
  const __m256 high = _mm256_castpd_ps(_mm256_cmp_pd(a.high, b.high, _CMP_LT_OQ));
  const __m256 halves = _mm256_shuffle_ps(low, high, 0x88);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8));
}
RCP_AVX2 RCP_INLINE Wide wide_select(Mask mask, Wide yes, Wide no) {
  const __m256i low = _mm256_cvtepi32_epi64(_mm_castps_si128(_mm256_castps256_ps128(mask)));
  const __m256i high = _mm256_cvtepi32_epi64(_mm_castps_si128(_mm256_extractf128_ps(mask, 1)));
  return {_mm256_blendv_pd(no.low, yes.low, _mm256_castsi256_pd(low)),
          _mm256_blendv_pd(no.high, yes.high, _mm256_castsi256_pd(high))};
}
RCP_AVX2 RCP_INLINE void exchange(int32_t* low, int32_t* high) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm256_min_epi32(a, b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm256_max_epi32(a, b));
}
RCP_AVX2 RCP_INLINE void exchange(int64_t* low, int64_t* high) {
  for (int half = 0; half < 8; half += 4) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + half));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + half));
    const __m256i swap = _mm256_cmpgt_epi64(a, b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + half), _mm256_blendv_epi8(a, b, swap));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + half), _mm256_blendv_epi8(b, a, swap));
  }
}

}  // namespace rcp::avx2::lanes
