// lanes16_scalar.h in one register: the functions of lanes_avx512.h, and these.
#pragma once

#include "rcp/cpu/lanes_avx512.h"

namespace rcp::avx512::lanes16 {

using Lanes = lanes::Vector;
using namespace lanes;

RCP_AVX512 RCP_INLINE Lanes power_of_two(Lanes n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
RCP_AVX512 RCP_INLINE Lanes keep_from(Lanes x, float limit, Lanes a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ), a);
}
// Each stage halves the number of registers, and the lanes that hold numbers of one register.
RCP_AVX512 RCP_INLINE Lanes sums(const float parts[16 * 16]) {
  // Registers 8 apart are paired first. The comments below say to which register the lanes belong.
  Lanes x[8];
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) {
    const Lanes a = load(parts + 16 * t), b = load(parts + 16 * (t + 8));
    x[t] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  }
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {
    x[t] = _mm512_shuffle_f32x4(x[t], x[t + 4], 0x88) + _mm512_shuffle_f32x4(x[t], x[t + 4], 0xdd);
  }
  // The four quarters of x[t] belong to registers t, t + 8, t + 4, t + 12.
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    x[t] = _mm512_shuffle_ps(x[t], x[t + 2], 0x44) + _mm512_shuffle_ps(x[t], x[t + 2], 0xee);
  }
  // Pairs of lanes in each quarter: t, t + 2.
  x[0] = _mm512_shuffle_ps(x[0], x[1], 0x88) + _mm512_shuffle_ps(x[0], x[1], 0xdd);
  // Lanes in each quarter: 0, 2, 1, 3.
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return _mm512_permutexvar_ps(order, x[0]);
}
template <bool FULL>
RCP_AVX512 RCP_INLINE void nibbles(const uint8_t* codes, int64_t bytes, Lanes& low, Lanes& high) {
  const __m128i raw =
      FULL ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)) : _mm_maskz_loadu_epi8(tail_mask(bytes), codes);
  const __m512i wide = _mm512_cvtepu8_epi32(raw);
  // vpermps reads only four bits of an index: it masks and converts in one instruction.
  const Lanes table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  low = _mm512_permutexvar_ps(wide, table);
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
}
RCP_AVX512 RCP_INLINE Lanes lookup(const float values[16], const uint8_t codes[16]) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return _mm512_permutexvar_ps(wide, _mm512_loadu_ps(values));
}
RCP_AVX512 RCP_INLINE void load_scales(const uint16_t* scales, Lanes& scale, Lanes& zero) {
  const __m512i raw = _mm512_loadu_si512(scales);
  scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw));
  zero = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(raw, 16)));
}
RCP_AVX512 RCP_INLINE Lanes load_any(const void* x, FloatType type, int64_t i, int64_t n) {
  const Mask mask = n <= 0 ? Mask{0} : tail_mask(n);
  if (type == FloatType::float32) return load<FloatType::float32>(x, i, mask);
  if (type == FloatType::float16) return load<FloatType::float16>(x, i, mask);
  return load<FloatType::bfloat16>(x, i, mask);
}
RCP_AVX512 RCP_INLINE void store_any(void* x, FloatType type, int64_t i, int64_t n, Lanes a) {
  const Mask mask = n <= 0 ? Mask{0} : tail_mask(n);
  if (type == FloatType::float32) return store<FloatType::float32>(x, i, a, mask);
  if (type == FloatType::float16) return store<FloatType::float16>(x, i, a, mask);
  return store<FloatType::bfloat16>(x, i, a, mask);
}
RCP_AVX512 RCP_INLINE void interleave(Lanes even, Lanes odd, Lanes& first, Lanes& second) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  first = _mm512_permutex2var_ps(even, low, odd);
  second = _mm512_permutex2var_ps(even, high, odd);
}
RCP_AVX512 RCP_INLINE void deinterleave(Lanes first, Lanes second, Lanes& even, Lanes& odd) {
  const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i high = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  even = _mm512_permutex2var_ps(first, low, second);
  odd = _mm512_permutex2var_ps(first, high, second);
}
RCP_AVX512 RCP_INLINE void store_nibbles(uint8_t* codes, int64_t bytes, Lanes even, Lanes odd) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvttps_epi32(odd), 4);
  const __m512i both = _mm512_or_si512(_mm512_cvttps_epi32(even), high);
  _mm_mask_storeu_epi8(codes, tail_mask(bytes), _mm512_cvtepi32_epi8(both));
}

}  // namespace rcp::avx512::lanes16
