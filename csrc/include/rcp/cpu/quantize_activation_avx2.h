#pragma once

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp::avx2 {

// 8 elements of any of the three types as float32.
template <FloatType TYPE>
RCP_AVX2 RCP_INLINE __m256 load8(const void* x, int64_t i) {
  if constexpr (TYPE == FloatType::float32) {
    return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  } else {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
    if constexpr (TYPE == FloatType::float16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
}

template <FloatType TYPE>
RCP_AVX2 RCP_INLINE void store8(void* y, int64_t i, __m256 value) {
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

// The last n < 8 elements, the rest zero. A copy, because AVX2 has no masked 16-bit load.
template <FloatType TYPE>
RCP_AVX2 inline __m256 load_tail(const void* x, int64_t i, int64_t n) {
  alignas(32) unsigned char copy[32] = {};
  std::memcpy(copy, advance(x, TYPE, i), static_cast<std::size_t>(n) * float_size(TYPE));
  return load8<TYPE>(copy, 0);
}

RCP_AVX2 RCP_INLINE __m256i magnitude_bits(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

template <FloatType TYPE>
RCP_AVX2 inline uint32_t largest_magnitude_of(const void* x, int64_t n) {
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) largest = _mm256_max_epu32(largest, magnitude_bits(load8<TYPE>(x, i)));
  if (i < n) largest = _mm256_max_epu32(largest, magnitude_bits(load_tail<TYPE>(x, i, n - i)));
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t result = 0;
  for (const uint32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

RCP_AVX2 RCP_INLINE void quantize8(__m256 value, __m256 inverse, __m256 low, __m256 high, int8_t out[8]) {
  value = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(value, inverse), low), high);
  // Rounded explicitly: vcvtps2dq alone would follow whatever rounding mode the caller has set.
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
}

template <FloatType TYPE>
RCP_AVX2 inline void quantize_of(const void* x, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  const __m256 inverse = _mm256_set1_ps(inverse_scale), high = _mm256_set1_ps(qmax), low = _mm256_set1_ps(-qmax - 1);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) quantize8(load8<TYPE>(x, i), inverse, low, high, q + i);
  if (i < n) {
    int8_t last[8];
    quantize8(load_tail<TYPE>(x, i, n - i), inverse, low, high, last);
    std::memcpy(q + i, last, static_cast<std::size_t>(n - i));
  }
}

RCP_AVX2 inline uint32_t largest_magnitude(const void* x, FloatType type, int64_t n) {
  switch (type) {
    case FloatType::float32:
      return largest_magnitude_of<FloatType::float32>(x, n);
    case FloatType::float16:
      return largest_magnitude_of<FloatType::float16>(x, n);
    default:
      return largest_magnitude_of<FloatType::bfloat16>(x, n);
  }
}

RCP_AVX2 inline void quantize(const void* x, FloatType type, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  switch (type) {
    case FloatType::float32:
      return quantize_of<FloatType::float32>(x, n, inverse_scale, qmax, q);
    case FloatType::float16:
      return quantize_of<FloatType::float16>(x, n, inverse_scale, qmax, q);
    default:
      return quantize_of<FloatType::bfloat16>(x, n, inverse_scale, qmax, q);
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

}  // namespace rcp::avx2
