// The passes of quantize_activation.h, which includes this file.
#pragma once

#include "rcp/cpu/lanes_avx512.h"

namespace rcp::avx512 {

RCP_AVX512 RCP_INLINE __m512i magnitude_bits(__m512 value) {
  return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
}

template <FloatType TYPE>
RCP_AVX512 inline uint32_t largest_magnitude(const void* x, int64_t n) {
  __m512i largest0 = _mm512_setzero_si512(), largest1 = largest0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    largest0 = _mm512_max_epu32(largest0, magnitude_bits(lanes::load<TYPE>(x, i)));
    largest1 = _mm512_max_epu32(largest1, magnitude_bits(lanes::load<TYPE>(x, i + 16)));
  }
  for (; i < n; i += 16) {
    largest0 = _mm512_max_epu32(largest0, magnitude_bits(lanes::load<TYPE>(x, i, lanes::tail_mask(n - i))));
  }
  return _mm512_reduce_max_epu32(_mm512_max_epu32(largest0, largest1));
}

template <FloatType TYPE>
RCP_AVX512 inline void quantize(const void* x, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  const __m512 inverse = _mm512_set1_ps(inverse_scale), high = _mm512_set1_ps(qmax), low = _mm512_set1_ps(-qmax - 1);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes::tail_mask(n - i);
    __m512 value = _mm512_mul_ps(lanes::load<TYPE>(x, i, mask), inverse);
    value = _mm512_min_ps(_mm512_max_ps(value, low), high);
    const __m512i rounded = _mm512_cvt_roundps_epi32(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(rounded));
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

inline constexpr QuantizeKernels quantize_kernels{RCP_BY_TYPE(largest_magnitude), RCP_BY_TYPE(quantize), sum};

}  // namespace rcp::avx512
