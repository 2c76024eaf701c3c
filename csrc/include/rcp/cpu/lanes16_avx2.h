// lanes16_scalar.h in two registers of eight lanes.
#pragma once

#include <algorithm>
#include <cstring>

#include "rcp/cpu/lanes_avx2.h"

namespace rcp::avx2::lanes16 {

struct Lanes {
  __m256 a, b;
};

RCP_AVX2 RCP_INLINE Lanes set1(float a) {
  return {_mm256_set1_ps(a), _mm256_set1_ps(a)};
}
RCP_AVX2 RCP_INLINE Lanes load(const float* x) {
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
RCP_AVX2 RCP_INLINE void store(float* x, Lanes a) {
  _mm256_storeu_ps(x, a.a);
  _mm256_storeu_ps(x + 8, a.b);
}
RCP_AVX2 RCP_INLINE Lanes operator+(Lanes a, Lanes b) {
  return {a.a + b.a, a.b + b.b};
}
RCP_AVX2 RCP_INLINE Lanes operator-(Lanes a, Lanes b) {
  return {a.a - b.a, a.b - b.b};
}
RCP_AVX2 RCP_INLINE Lanes operator*(Lanes a, Lanes b) {
  return {a.a * b.a, a.b * b.b};
}
RCP_AVX2 RCP_INLINE Lanes operator/(Lanes a, Lanes b) {
  return {a.a / b.a, a.b / b.b};
}
RCP_AVX2 RCP_INLINE Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)};
}
RCP_AVX2 RCP_INLINE Lanes min(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)};
}
RCP_AVX2 RCP_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
RCP_AVX2 RCP_INLINE Lanes round_even(Lanes a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.a, nearest), _mm256_round_ps(a.b, nearest)};
}
RCP_AVX2 RCP_INLINE __m256 power_of_two8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127)), 23));
}
RCP_AVX2 RCP_INLINE Lanes power_of_two(Lanes n) {
  return {power_of_two8(n.a), power_of_two8(n.b)};
}
RCP_AVX2 RCP_INLINE Lanes keep_from(Lanes x, float limit, Lanes a) {
  const __m256 bound = _mm256_set1_ps(limit);
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, bound, _CMP_GE_OQ), a.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, bound, _CMP_GE_OQ), a.b)};
}
// The sums of eight of the sixteen registers.
RCP_AVX2 RCP_INLINE __m256 sums8(const float* parts) {
  __m256 x[8];
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t)
    x[t] = _mm256_add_ps(_mm256_loadu_ps(parts + 16 * t), _mm256_loadu_ps(parts + 16 * t + 8));
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {
    x[t] = _mm256_add_ps(_mm256_permute2f128_ps(x[t], x[t + 4], 0x20), _mm256_permute2f128_ps(x[t], x[t + 4], 0x31));
  }
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    x[t] = _mm256_add_ps(_mm256_shuffle_ps(x[t], x[t + 2], 0x44), _mm256_shuffle_ps(x[t], x[t + 2], 0xee));
  }
  x[0] = _mm256_add_ps(_mm256_shuffle_ps(x[0], x[1], 0x88), _mm256_shuffle_ps(x[0], x[1], 0xdd));
  return _mm256_permutevar8x32_ps(x[0], _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7));
}
RCP_AVX2 RCP_INLINE Lanes sums(const float parts[16 * 16]) {
  return {sums8(parts), sums8(parts + 8 * 16)};
}
template <bool FULL>
RCP_AVX2 RCP_INLINE void nibbles(const uint8_t* codes, int64_t bytes, Lanes& low, Lanes& high) {
  __m128i raw;
  if constexpr (FULL) {
    raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  } else {
    alignas(16) uint8_t copy[16] = {};
    std::memcpy(copy, codes, static_cast<std::size_t>(bytes));
    raw = _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
  }
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(raw, mask), odd = _mm_and_si128(_mm_srli_epi16(raw, 4), mask);
  low = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(even)),
         _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(even, 8)))};
  high = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(odd)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(odd, 8)))};
}
RCP_AVX2 RCP_INLINE __m256 lookup8(__m256 low, __m256 high, __m128i codes) {
  const __m256i code = _mm256_cvtepu8_epi32(codes);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 as the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), upper);
}
RCP_AVX2 RCP_INLINE Lanes lookup(const float values[16], const uint8_t codes[16]) {
  const __m256 low = _mm256_loadu_ps(values), high = _mm256_loadu_ps(values + 8);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return {lookup8(low, high, raw), lookup8(low, high, _mm_srli_si128(raw, 8))};
}
RCP_AVX2 RCP_INLINE __m256 halves(__m256i words) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
RCP_AVX2 RCP_INLINE void load_scales(const uint16_t* scales, Lanes& scale, Lanes& zero) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 16));
  const __m256i mask = _mm256_set1_epi32(0xffff);
  scale = {halves(_mm256_and_si256(a, mask)), halves(_mm256_and_si256(b, mask))};
  zero = {halves(_mm256_srli_epi32(a, 16)), halves(_mm256_srli_epi32(b, 16))};
}
template <FloatType TYPE>
RCP_AVX2 RCP_INLINE __m256 load_part(const void* x, int64_t i, int64_t n) {
  if (n >= 8) return lanes::load<TYPE>(x, i);
  return n <= 0 ? _mm256_setzero_ps() : lanes::load_tail<TYPE>(x, i, n);
}
template <FloatType TYPE>
RCP_AVX2 RCP_INLINE void store_part(void* x, int64_t i, int64_t n, __m256 a) {
  if (n >= 8) return lanes::store<TYPE>(x, i, a);
  if (n <= 0) return;
  alignas(32) unsigned char copy[32];
  lanes::store<TYPE>(copy, 0, a);
  std::memcpy(advance(x, TYPE, i), copy, static_cast<std::size_t>(n) * float_size(TYPE));
}
template <FloatType TYPE>
RCP_AVX2 RCP_INLINE Lanes load_lanes(const void* x, int64_t i, int64_t n) {
  return {load_part<TYPE>(x, i, n), load_part<TYPE>(x, i + 8, n - 8)};
}
template <FloatType TYPE>
RCP_AVX2 RCP_INLINE void store_lanes(void* x, int64_t i, int64_t n, Lanes a) {
  store_part<TYPE>(x, i, n, a.a);
  store_part<TYPE>(x, i + 8, n - 8, a.b);
}
RCP_AVX2 RCP_INLINE Lanes load_any(const void* x, FloatType type, int64_t i, int64_t n) {
  if (type == FloatType::float32) return load_lanes<FloatType::float32>(x, i, n);
  if (type == FloatType::float16) return load_lanes<FloatType::float16>(x, i, n);
  return load_lanes<FloatType::bfloat16>(x, i, n);
}
RCP_AVX2 RCP_INLINE void store_any(void* x, FloatType type, int64_t i, int64_t n, Lanes a) {
  if (type == FloatType::float32) return store_lanes<FloatType::float32>(x, i, n, a);
  if (type == FloatType::float16) return store_lanes<FloatType::float16>(x, i, n, a);
  return store_lanes<FloatType::bfloat16>(x, i, n, a);
}
RCP_AVX2 RCP_INLINE Lanes interleave8(__m256 even, __m256 odd) {
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
RCP_AVX2 RCP_INLINE void interleave(Lanes even, Lanes odd, Lanes& first, Lanes& second) {
  first = interleave8(even.a, odd.a);
  second = interleave8(even.b, odd.b);
}
RCP_AVX2 RCP_INLINE __m256 every_second(__m256 a, __m256 b, bool odd) {
  const __m256 mixed = odd ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
RCP_AVX2 RCP_INLINE void deinterleave(Lanes first, Lanes second, Lanes& even, Lanes& odd) {
  even = {every_second(first.a, first.b, false), every_second(second.a, second.b, false)};
  odd = {every_second(first.a, first.b, true), every_second(second.a, second.b, true)};
}
RCP_AVX2 RCP_INLINE void store_nibbles(uint8_t* codes, int64_t bytes, Lanes even, Lanes odd) {
  const __m256i a = _mm256_or_si256(_mm256_cvttps_epi32(even.a), _mm256_slli_epi32(_mm256_cvttps_epi32(odd.a), 4));
  const __m256i b = _mm256_or_si256(_mm256_cvttps_epi32(even.b), _mm256_slli_epi32(_mm256_cvttps_epi32(odd.b), 4));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  alignas(16) uint8_t all[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(all),
                  _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  std::memcpy(codes, all, static_cast<std::size_t>(std::min<int64_t>(bytes, 16)));
}

}  // namespace rcp::avx2::lanes16
