// Per-token symmetric activation quantization.
//
//   amax = max|x|                s = fl32(fl32(amax * clip) / qmax)        qmax = 7 (4 bits) or 127 (8 bits)
//   q = clamp(rint(fl32(x * fl32(1/s))), -qmax-1, qmax)                   ties to even
//
// s below 2^-120 counts as a zero token (s = 0, q = 0): above it neither 1/s overflows nor does a subnormal x matter,
// so the result does not depend on the flush-to-zero mode the caller runs in.
#pragma once

#include <cmath>

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp {

// The three passes over a token, one implementation per ISA. Integer results, hence equal on all of them.
struct QuantizeKernels {
  // Largest |x[i]| as float bits: as integers, magnitudes order like floats and Inf/NaN are the largest.
  uint32_t (*largest_magnitude)(const void* x, FloatType type, int64_t n);
  // q[i] = rint(clamp(x[i] * inverse_scale, -qmax-1, qmax)): with integer bounds, clamping before rounding is the same.
  void (*quantize)(const void* x, FloatType type, int64_t n, float inverse_scale, float qmax, int8_t* q);
  int32_t (*sum)(const int8_t* q, int64_t n);
};

namespace scalar {

inline uint32_t largest_magnitude(const void* x, FloatType type, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(load_float(x, type, i)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

inline void quantize(const void* x, FloatType type, int64_t n, float inverse_scale, float qmax, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) {
    float value = load_float(x, type, i) * inverse_scale;
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

}  // namespace scalar
}  // namespace rcp

#if RCP_X86
#include "rcp/cpu/quantize_activation_avx2.h"
#include "rcp/cpu/quantize_activation_avx512.h"
#endif

namespace rcp {

inline QuantizeKernels quantize_kernels(Isa isa) {
#if RCP_X86
  if (isa >= Isa::avx512) return {avx512::largest_magnitude, avx512::quantize, avx512::sum};
  if (isa == Isa::avx2) return {avx2::largest_magnitude, avx2::quantize, avx2::sum};
#endif
  (void)isa;
  return {scalar::largest_magnitude, scalar::quantize, scalar::sum};
}

inline float quantization_maximum(int bits) {
  return bits == 4 ? 7.0f : 127.0f;
}

// The token's scale; `finite` turns false where x holds NaN or Inf.
inline float token_scale(const QuantizeKernels& kernels, const void* x, FloatType type, int64_t n, float qmax,
                         float clip, bool& finite) {
  const uint32_t largest = kernels.largest_magnitude(x, type, n);
  finite = largest < 0x7f800000u;
  const float scale = float_of(largest) * clip / qmax;
  return finite && scale >= 0x1p-120f ? scale : 0.0f;
}

// Two's complement nibbles, even k low; an odd n leaves the last high nibble 0.
inline void pack_nibbles(const int8_t* q, int64_t n, uint8_t* packed) {
  for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>((q[2 * i] & 15) | ((q[2 * i + 1] & 15) << 4));
  if (n % 2) packed[n / 2] = static_cast<uint8_t>(q[n - 1] & 15);
}

}  // namespace rcp
