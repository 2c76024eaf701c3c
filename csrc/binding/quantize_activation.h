// The arguments of quantize_activation, checked for every device.
#pragma once

#include "binding/tensors.h"

namespace rcp::binding {

inline void check_quantization(const std::string& op, int64_t bits, double clip, bool packed) {
  if (bits != 4 && bits != 8) fail(op + ": bits must be 4 or 8, got " + std::to_string(bits) + "; choose one of them");
  check_clip(op, clip);
  if (packed && bits != 4) fail(op + ": packed storage holds two 4-bit values a byte, got bits=8; use packed=False");
}

inline FloatType check_quantize_activation(const Tensor& x, int64_t bits, double clip, bool packed) {
  check_quantization("quantize_activation", bits, clip, packed);
  last_size("quantize_activation", x);
  return float_type(x, "quantize_activation: x");
}

}  // namespace rcp::binding
