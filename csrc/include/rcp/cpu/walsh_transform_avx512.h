// The registers of walsh_transform_vector.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "rcp/cpu/lanes_avx512.h"
#include "rcp/cpu/walsh_transform_plan.h"

namespace rcp::avx512::walsh {

using namespace lanes;
inline constexpr int lane_bits = 4;

RCP_AVX512 RCP_INLINE Vector permute_lanes(Vector v, const std::array<int32_t, 16>& order) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(order.data()), v);
}

// Lanes whose index has bit B set.
template <int B>
inline constexpr __mmask16 lanes_with = B == 0   ? 0xaaaa
                                        : B == 1 ? 0xcccc
                                        : B == 2 ? 0xf0f0
                                                 : 0xff00;

template <int B, bool SET>
RCP_AVX512 RCP_INLINE Vector merge(Vector keep, Vector other) {
  constexpr __mmask16 mask = SET ? lanes_with<B> : static_cast<__mmask16>(~lanes_with<B>);
  if constexpr (B == 0) return _mm512_mask_permute_ps(keep, mask, other, 0xb1);
  if constexpr (B == 1) return _mm512_mask_permute_ps(keep, mask, other, 0x4e);
  if constexpr (B == 2) return _mm512_mask_shuffle_f32x4(keep, mask, other, other, 0xb1);
  return _mm512_mask_shuffle_f32x4(keep, mask, other, other, 0x4e);
}
template <int B>
RCP_AVX512 RCP_INLINE Vector swap_lanes(Vector v) {
  if constexpr (B == 0) return _mm512_permute_ps(v, 0xb1);
  if constexpr (B == 1) return _mm512_permute_ps(v, 0x4e);
  if constexpr (B == 2) return _mm512_shuffle_f32x4(v, v, 0xb1);
  return _mm512_shuffle_f32x4(v, v, 0x4e);
}
// (a, b) -> (a + b, a - b), as swapped + v * (1, -1). The product is exact, so this rounds as the plain sum does. One
// fused instruction on the multiplier's ports replaces two on the adder's ports.
template <int B>
RCP_AVX512 RCP_INLINE Vector butterfly_lanes(Vector v) {
  const Vector signs = _mm512_mask_blend_ps(lanes_with<B>, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return _mm512_fmadd_ps(v, signs, swap_lanes<B>(v));
}

#define RCP_TARGET RCP_AVX512
#include "rcp/cpu/walsh_transform_vector.h"
#undef RCP_TARGET

}  // namespace rcp::avx512::walsh
