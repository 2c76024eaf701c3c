#pragma once

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp::avx512 {

RCP_AVX512 RCP_INLINE __mmask16 tail_mask(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

// 16 elements of any of the three types as float32; the ones beyond the mask read as zero and touch no memory.
template <FloatType TYPE>
RCP_AVX512 RCP_INLINE __m512 load16(const void* x, int64_t i, __mmask16 mask) {
  if constexpr (TYPE == FloatType::float32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
    if constexpr (TYPE == FloatType::float16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
}

template <FloatType TYPE>
RCP_AVX512 RCP_INLINE void store16(void* y, int64_t i, __mmask16 mask, __m512 value) {
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

template <FloatType TYPE>
RCP_AVX512 inline uint32_t largest_magnitude_of(const void* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest0 = _mm512_setzero_si512(), largest1 = largest0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    largest0 = _mm512_max_epu32(largest0, _mm512_and_si512(magnitude, _mm512_castps_si512(load16<TYPE>(x, i, 0xffff))));
    largest1 =
        _mm512_max_epu32(largest1, _mm512_and_si512(magnitude, _mm512_castps_si512(load16<TYPE>(x, i + 16, 0xffff))));
  }
  for (; i < n; i += 16) {
    largest0 = _mm512_max_epu32(largest0,
                                _mm512_and_si512(magnitude, _mm512_castps_si512(load16<TYPE>(x, i, tail_mask(n - i)))));
  }
  return _mm512_reduce_max_epu32(_mm512_max_epu32(largest0, largest1));
}

template <FloatType TYPE>
RCP_AVX512 inline void quantize_of(const void* x, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  const __m512 inverse = _mm512_set1_ps(inverse_scale), high = _mm512_set1_ps(qmax), low = _mm512_set1_ps(-qmax - 1);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = tail_mask(n - i);
    __m512 value = _mm512_mul_ps(load16<TYPE>(x, i, mask), inverse);
    value = _mm512_min_ps(_mm512_max_ps(value, low), high);
    const __m512i rounded = _mm512_cvt_roundps_epi32(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(rounded));
  }
}

RCP_AVX512 inline uint32_t largest_magnitude(const void* x, FloatType type, int64_t n) {
  switch (type) {
    case FloatType::float32:
      return largest_magnitude_of<FloatType::float32>(x, n);
    case FloatType::float16:
      return largest_magnitude_of<FloatType::float16>(x, n);
    default:
      return largest_magnitude_of<FloatType::bfloat16>(x, n);
  }
}

RCP_AVX512 inline void quantize(const void* x, FloatType type, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  switch (type) {
    case FloatType::float32:
      return quantize_of<FloatType::float32>(x, n, inverse_scale, qmax, q);
    case FloatType::float16:
      return quantize_of<FloatType::float16>(x, n, inverse_scale, qmax, q);
    default:
      return quantize_of<FloatType::bfloat16>(x, n, inverse_scale, qmax, q);
  }
}

RCP_AVX512 inline int32_t sum(const int8_t* q, int64_t n) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) total = _mm512_dpbusd_epi32(total, ones, _mm512_loadu_si512(q + i));
  if (i < n) total = _mm512_dpbusd_epi32(total, ones, _mm512_maskz_loadu_epi8((~0ull) >> (64 - (n - i)), q + i));
  return _mm512_reduce_add_epi32(total);
}

}  // namespace rcp::avx512
