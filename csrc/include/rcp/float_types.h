// The three floating-point types of activations, and their conversions to and from float32 in plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rcp {

enum class FloatType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

inline std::size_t float_size(FloatType type) {
  return type == FloatType::float32 ? 4 : 2;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact in float32
  return sign ? -magnitude : magnitude;
}

// Round to nearest, ties to even, as vcvtps2ph does.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x33000001u) return static_cast<uint16_t>(sign);
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const int shift = exponent < -14 ? -1 - exponent : 13;
  const uint32_t halfway = 1u << (shift - 1), rest = mantissa & ((1u << shift) - 1);
  uint32_t rounded = mantissa >> shift;
  if (rest > halfway || (rest == halfway && (rounded & 1u))) ++rounded;
  if (exponent >= -14) rounded += static_cast<uint32_t>(exponent + 14) << 10;
  return static_cast<uint16_t>(sign | rounded);
}

inline float bfloat_to_float(uint16_t value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load_float(const void* x, FloatType type, int64_t i) {
  if (type == FloatType::float32) return static_cast<const float*>(x)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  return type == FloatType::float16 ? half_to_float(bits) : bfloat_to_float(bits);
}

inline void store_float(void* y, FloatType type, int64_t i, float value) {
  if (type == FloatType::float32) {
    static_cast<float*>(y)[i] = value;
  } else {
    static_cast<uint16_t*>(y)[i] = type == FloatType::float16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

inline const void* advance(const void* x, FloatType type, int64_t n) {
  return static_cast<const char*>(x) + n * static_cast<int64_t>(float_size(type));
}

inline void* advance(void* x, FloatType type, int64_t n) {
  return static_cast<char*>(x) + n * static_cast<int64_t>(float_size(type));
}

// One function for each type. RCP_BY_TYPE(f) fills it with the instances of the template f<FloatType>.
template <class Function>
struct ByType {
  Function* functions[3];
  Function* operator[](FloatType type) const { return functions[static_cast<int>(type)]; }
};
#define RCP_BY_TYPE(f)                                                                          \
  {                                                                                             \
    {                                                                                           \
      f<::rcp::FloatType::float32>, f<::rcp::FloatType::float16>, f<::rcp::FloatType::bfloat16> \
    }                                                                                           \
  }

}  // namespace rcp
