// Per-token symmetric quantization of activations.
//
//   amax = max|x|                s = fl32(fl32(amax * clip) / qmax)        qmax = 7 (4 bits) or 127 (8 bits)
//   q = clamp(rint(fl32(x * fl32(1/s))), -qmax-1, qmax)                   ties to even
//
// A scale below 2^-120 counts as 0, with q = 0. Above it 1/s does not overflow and subnormal x do not matter, so the
// result does not depend on the caller's flush-to-zero mode.
#pragma once

#include <cmath>

#include "rcp/cpu/lanes.h"
#include "rcp/float_types.h"

namespace rcp {

// The three passes over a token. Their results are integers, and equal on every instruction set.
struct QuantizeKernels {
  // The bits of the largest |x[i]|. As integers, magnitudes order as floats do, and Inf and NaN are the largest.
  ByType<uint32_t(const void* x, int64_t n)> largest_magnitude;
  // q[i] = rint(clamp(x[i] * inverse_scale, -qmax-1, qmax)): with integer bounds, clamping before rounding gives the
  // same as after.
  ByType<void(const void* x, int64_t n, float inverse_scale, float qmax, int8_t* q)> quantize;
  int32_t (*sum)(const int8_t* q, int64_t n);
};

namespace scalar {

template <FloatType TYPE>
uint32_t largest_magnitude(const void* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(load_float(x, TYPE, i)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <FloatType TYPE>
void quantize(const void* x, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) {
    float value = load_float(x, TYPE, i) * inverse_scale;
    value = value < -qmax - 1 ? -qmax - 1 : value;
    value = value > qmax ? qmax : value;
    q[i] = static_cast<int8_t>(std::nearbyint(value));
  }
}

inline int32_t sum(const int8_t* q, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += q[i];
  return total;
}

inline constexpr QuantizeKernels quantize_kernels{RCP_BY_TYPE(largest_magnitude), RCP_BY_TYPE(quantize), sum};

}  // namespace scalar
}  // namespace rcp

#if RCP_X86
#include "rcp/cpu/quantize_activation_avx2.h"
#include "rcp/cpu/quantize_activation_avx512.h"
#endif

namespace rcp {

inline float quantization_maximum(int bits) {
  return bits == 4 ? 7.0f : 127.0f;
}

// The scale of a token and its inverse (0 for a scale of 0). `finite` is false where x holds NaN or Inf.
struct TokenScale {
  float scale, inverse;
  bool finite;
};

inline TokenScale token_scale(const QuantizeKernels& kernels, const void* x, FloatType type, int64_t n, float qmax,
                              float clip) {
  const uint32_t largest = kernels.largest_magnitude[type](x, n);
  const bool finite = largest < 0x7f800000u;
  const float scale = float_of(largest) * clip / qmax;
  if (!finite || !(scale >= 0x1p-120f)) return {0.0f, 0.0f, finite};
  return {scale, 1.0f / scale, true};
}

// Two's complement nibbles, even k low. Where n is odd, the last high nibble is 0.
inline void pack_nibbles(const int8_t* q, int64_t n, uint8_t* packed) {
  for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>((q[2 * i] & 15) | ((q[2 * i + 1] & 15) << 4));
  if (n % 2) packed[n / 2] = static_cast<uint8_t>(q[n - 1] & 15);
}

}  // namespace rcp
