// The registers of walsh_transform_vector.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "rcp/cpu/lanes_avx2.h"
#include "rcp/cpu/walsh_transform_plan.h"

namespace rcp::avx2::walsh {

using namespace lanes;
inline constexpr int lane_bits = 3;

RCP_AVX2 RCP_INLINE Vector permute_lanes(Vector v, const std::array<int32_t, 16>& order) {
  return _mm256_permutevar8x32_ps(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order.data())));
}

// Lanes whose index has bit B set.
template <int B>
inline constexpr int lanes_with = B == 0   ? 0xaa
                                  : B == 1 ? 0xcc
                                           : 0xf0;

template <int B>
RCP_AVX2 RCP_INLINE Vector swap_lanes(Vector v) {
  if constexpr (B == 0) return _mm256_permute_ps(v, 0xb1);
  if constexpr (B == 1) return _mm256_permute_ps(v, 0x4e);
  return _mm256_permute2f128_ps(v, v, 1);
}
template <int B, bool SET>
RCP_AVX2 RCP_INLINE Vector merge(Vector keep, Vector other) {
  return _mm256_blend_ps(keep, swap_lanes<B>(other), SET ? lanes_with<B> : 0xff ^ lanes_with<B>);
}
// As in walsh_transform_avx512.h.
template <int B>
RCP_AVX2 RCP_INLINE Vector butterfly_lanes(Vector v) {
  const Vector signs = _mm256_blend_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(-1.0f), lanes_with<B>);
  return _mm256_fmadd_ps(v, signs, swap_lanes<B>(v));
}

#define RCP_TARGET RCP_AVX2
#include "rcp/cpu/walsh_transform_vector.h"
#undef RCP_TARGET

}  // namespace rcp::avx2::walsh
