// Sixteen float32 lanes in plain C++, and the 4-bit codes of the key-value cache. lanes16_avx2.h and lanes16_avx512.h
// have the same names, and give the same bits.
#pragma once

#include <cmath>
#include <cstring>

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp::scalar::lanes16 {

struct Lanes {
  float v[16];
};

template <class F>
RCP_INLINE Lanes each(const F& f) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}
RCP_INLINE Lanes set1(float a) {
  return each([&](int) { return a; });
}
RCP_INLINE Lanes load(const float* x) {
  return each([&](int i) { return x[i]; });
}
RCP_INLINE void store(float* x, Lanes a) {
  std::memcpy(x, a.v, sizeof a.v);
}
RCP_INLINE Lanes operator+(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
RCP_INLINE Lanes operator-(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
RCP_INLINE Lanes operator*(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
RCP_INLINE Lanes operator/(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
RCP_INLINE Lanes max(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
RCP_INLINE Lanes min(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
RCP_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
RCP_INLINE Lanes round_even(Lanes a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}
// 2^n for integers n in [-126, 127].
RCP_INLINE Lanes power_of_two(Lanes n) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
// a where x >= limit, else 0.
RCP_INLINE Lanes keep_from(Lanes x, float limit, Lanes a) {
  return each([&](int i) { return x.v[i] >= limit ? a.v[i] : 0.0f; });
}
// Lane t: the sum of the t-th of sixteen registers, in the order of sum_of.
RCP_INLINE Lanes sums(const float parts[16 * 16]) {
  return each([&](int t) {
    float x[16];
    std::memcpy(x, parts + 16 * t, sizeof x);
    for (int half = 8; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) x[j] = x[j] + x[j + half];
    }
    return x[0];
  });
}
// The low and the high nibbles of `bytes` bytes, of sixteen where FULL. Other lanes are 0.
template <bool FULL>
RCP_INLINE void nibbles(const uint8_t* codes, int64_t bytes, Lanes& low, Lanes& high) {
  low = each([&](int i) { return FULL || i < bytes ? static_cast<float>(codes[i] & 15) : 0.0f; });
  high = each([&](int i) { return FULL || i < bytes ? static_cast<float>(codes[i] >> 4) : 0.0f; });
}
// values[codes[i]].
RCP_INLINE Lanes lookup(const float values[16], const uint8_t codes[16]) {
  return each([&](int i) { return values[codes[i]]; });
}
// The scales and zero-points of sixteen positions, which alternate in memory.
RCP_INLINE void load_scales(const uint16_t* scales, Lanes& scale, Lanes& zero) {
  scale = each([&](int i) { return half_to_float(scales[2 * i]); });
  zero = each([&](int i) { return half_to_float(scales[2 * i + 1]); });
}
// Elements [i, i + min(n, 16)) of a type; n may be 0 or negative. Other lanes are 0.
RCP_INLINE Lanes load_any(const void* x, FloatType type, int64_t i, int64_t n) {
  return each([&](int j) { return j < n ? load_float(x, type, i + j) : 0.0f; });
}
RCP_INLINE void store_any(void* x, FloatType type, int64_t i, int64_t n, Lanes a) {
  for (int j = 0; j < 16 && j < n; ++j) store_float(x, type, i + j, a.v[j]);
}
// Lanes of even k and lanes of odd k, merged into ascending k.
RCP_INLINE void interleave(Lanes even, Lanes odd, Lanes& first, Lanes& second) {
  first = each([&](int i) { return i % 2 ? odd.v[i / 2] : even.v[i / 2]; });
  second = each([&](int i) { return i % 2 ? odd.v[8 + i / 2] : even.v[8 + i / 2]; });
}
// The inverse of interleave.
RCP_INLINE void deinterleave(Lanes first, Lanes second, Lanes& even, Lanes& odd) {
  even = each([&](int i) { return i < 8 ? first.v[2 * i] : second.v[2 * i - 16]; });
  odd = each([&](int i) { return i < 8 ? first.v[2 * i + 1] : second.v[2 * i - 15]; });
}
// Integers 0 to 15 of even k (low nibble) and odd k (high nibble) as `bytes` bytes, at most sixteen.
RCP_INLINE void store_nibbles(uint8_t* codes, int64_t bytes, Lanes even, Lanes odd) {
  for (int i = 0; i < 16 && i < bytes; ++i) {
    codes[i] = static_cast<uint8_t>(static_cast<int>(even.v[i]) | (static_cast<int>(odd.v[i]) << 4));
  }
}

}  // namespace rcp::scalar::lanes16
