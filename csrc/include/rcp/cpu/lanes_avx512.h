// The names of lanes_scalar.h for sixteen lanes; also fused multiply-adds, and loads and stores of all float types.
#pragma once

#include <cstdint>

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp::avx512::lanes {

inline constexpr int64_t count = 16;

using Vector = __m512;
using Mask = __mmask16;
struct Wide {
  __m512d low, high;
};

// The first n lanes, n >= 1.
RCP_AVX512 RCP_INLINE Mask tail_mask(int64_t n) {
  return static_cast<Mask>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

// Elements [i, i + 16) of any of the three types as float32. Those outside the mask are 0, and their memory is not
// touched.
template <FloatType TYPE>
RCP_AVX512 RCP_INLINE Vector load(const void* x, int64_t i, Mask mask = 0xffff) {
  if constexpr (TYPE == FloatType::float32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
    if constexpr (TYPE == FloatType::float16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
}

template <FloatType TYPE>
RCP_AVX512 RCP_INLINE void store(void* y, int64_t i, Vector value, Mask mask = 0xffff) {
  if constexpr (TYPE == FloatType::float32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + i, mask, value);
  } else {
    __m256i raw;
    if constexpr (TYPE == FloatType::float16) {
      raw = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
      raw = _mm512_cvtepi32_epi16(rounded);
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, raw);
  }
}
RCP_AVX512 RCP_INLINE Vector load(const float* x) {
  return _mm512_loadu_ps(x);
}
RCP_AVX512 RCP_INLINE void store(float* x, Vector v) {
  _mm512_storeu_ps(x, v);
}
RCP_AVX512 RCP_INLINE void store_bytes(uint8_t* x, Vector v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
RCP_AVX512 RCP_INLINE Vector set1(float x) {
  return _mm512_set1_ps(x);
}
RCP_AVX512 RCP_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_fmadd_ps(a, b, c);
}
RCP_AVX512 RCP_INLINE Vector min(Vector a, Vector b) {
  return _mm512_min_ps(a, b);
}
RCP_AVX512 RCP_INLINE Vector max(Vector a, Vector b) {
  return _mm512_max_ps(a, b);
}
RCP_AVX512 RCP_INLINE Mask greater(Vector a, Vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
RCP_AVX512 RCP_INLINE Vector select(Mask mask, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}
RCP_AVX512 RCP_INLINE Vector round_even(Vector a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RCP_AVX512 RCP_INLINE Wide widen(Vector a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))};
}
RCP_AVX512 RCP_INLINE Wide operator+(Wide a, Wide b) {
  return {a.low + b.low, a.high + b.high};
}
RCP_AVX512 RCP_INLINE Wide operator*(Wide a, Wide b) {
  return {a.low * b.low, a.high * b.high};
}
RCP_AVX512 RCP_INLINE Mask wide_less(Wide a, Wide b) {
  const unsigned low = _mm512_cmp_pd_mask(a.low, b.low, _CMP_LT_OQ);
  const unsigned high = _mm512_cmp_pd_mask(a.high, b.high, _CMP_LT_OQ);
  return static_cast<Mask>(low | (high << 8));
}
RCP_AVX512 RCP_INLINE Wide wide_select(Mask mask, Wide yes, Wide no) {
  return {_mm512_mask_blend_pd(static_cast<__mmask8>(mask), no.low, yes.low),
          _mm512_mask_blend_pd(static_cast<__mmask8>(mask >> 8), no.high, yes.high)};
}
RCP_AVX512 RCP_INLINE void exchange(int32_t* low, int32_t* high) {
  const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
  _mm512_storeu_si512(low, _mm512_min_epi32(a, b));
  _mm512_storeu_si512(high, _mm512_max_epi32(a, b));
}
RCP_AVX512 RCP_INLINE void exchange(int64_t* low, int64_t* high) {
  for (int half = 0; half < 16; half += 8) {
    const __m512i a = _mm512_loadu_si512(low + half), b = _mm512_loadu_si512(high + half);
    _mm512_storeu_si512(low + half, _mm512_min_epi64(a, b));
    _mm512_storeu_si512(high + half, _mm512_max_epi64(a, b));
  }
}

}  // namespace rcp::avx512::lanes
