// The passes of quantize_activation.h, which includes this file.
#pragma once

#include "rcp/cpu/lanes_avx2.h"

namespace rcp::avx2 {

RCP_AVX2 RCP_INLINE __m256i magnitude_bits(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

template <FloatType TYPE>
RCP_AVX2 inline uint32_t largest_magnitude(const void* x, int64_t n) {
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) largest = _mm256_max_epu32(largest, magnitude_bits(lanes::load<TYPE>(x, i)));
  if (i < n) largest = _mm256_max_epu32(largest, magnitude_bits(lanes::load_tail<TYPE>(x, i, n - i)));
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t result = 0;
  for (const uint32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

RCP_AVX2 RCP_INLINE void quantize8(__m256 value, __m256 inverse, __m256 low, __m256 high, int8_t out[8]) {
  value = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(value, inverse), low), high);
  // Rounded first: vcvtps2dq alone would follow the caller's rounding mode.
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
}

template <FloatType TYPE>
RCP_AVX2 inline void quantize(const void* x, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps(inverse_scale), high = _mm256_set1_ps(qmax), low = _mm256_set1_ps(-qmax - 1);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) quantize8(lanes::load<TYPE>(x, i), inverse, low, high, q + i);
  if (i < n) {
    int8_t last[8];
    quantize8(lanes::load_tail<TYPE>(x, i, n - i), inverse, low, high, last);
    std::memcpy(q + i, last, static_cast<std::size_t>(n - i));
  }
}

RCP_AVX2 inline int32_t sum(const int8_t* q, int64_t n) {
  int32_t total = 0;
  int64_t i = 0;
  __m256i lanes = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi8(1), wide_ones = _mm256_set1_epi16(1);
  for (; i + 32 <= n; i += 32) {
    const __m256i pairs = _mm256_maddubs_epi16(ones, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i)));
    lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(pairs, wide_ones));
  }
  alignas(32) int32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), lanes);
  for (const int32_t part : parts) total += part;
  for (; i < n; ++i) total += q[i];
  return total;
}

inline constexpr QuantizeKernels quantize_kernels{RCP_BY_TYPE(largest_magnitude), RCP_BY_TYPE(quantize), sum};

}  // namespace rcp::avx2
