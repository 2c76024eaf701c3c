// A register of float32 lanes for any CPU: one lane. lanes_avx2.h and lanes_avx512.h have the same names. Lanes also
// have the operators + - * /.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rcp/cpu/isa.h"

namespace rcp::scalar::lanes {

inline constexpr int64_t count = 1;

using Vector = float;
using Mask = bool;    // one truth value a lane
using Wide = double;  // the same lanes in float64; has + and *

RCP_INLINE Vector load(const float* x) {
  return *x;
}
RCP_INLINE void store(float* x, Vector v) {
  *x = v;
}
// Stores lanes that hold integers in [0, 127] as bytes.
RCP_INLINE void store_bytes(uint8_t* x, Vector v) {
  *x = static_cast<uint8_t>(v);
}
RCP_INLINE Vector set1(float x) {
  return x;
}
RCP_INLINE Vector min(Vector a, Vector b) {
  return a < b ? a : b;
}
RCP_INLINE Vector max(Vector a, Vector b) {
  return a > b ? a : b;
}
RCP_INLINE Mask greater(Vector a, Vector b) {
  return a > b;
}
RCP_INLINE Vector select(Mask mask, Vector yes, Vector no) {
  return mask ? yes : no;
}
// To the nearest integer, ties to even, for 0 <= a < 2^22: the sum has no bits left below 1.
RCP_INLINE Vector round_even(Vector a) {
  return (a + 0x1.8p23f) - 0x1.8p23f;
}
RCP_INLINE Wide widen(Vector a) {
  return a;
}
RCP_INLINE Mask wide_less(Wide a, Wide b) {
  return a < b;
}
RCP_INLINE Wide wide_select(Mask mask, Wide yes, Wide no) {
  return mask ? yes : no;
}
// The smaller of two integers of each lane to `low`, the larger to `high`.
template <class Key>
RCP_INLINE void exchange(Key* low, Key* high) {
  const Key a = *low, b = *high;
  *low = std::min(a, b);
  *high = std::max(a, b);
}

}  // namespace rcp::scalar::lanes
