// The arguments of pack_weight, unpack_weight and dequantize, and the weight of every operator, checked for every
// device.
#pragma once

#include <cmath>

#include "binding/tensors.h"
#include "rcp/cpu/weight_layout.h"

namespace rcp::binding {

using rcp::checked_shape;

// The canonical tensors of a weight, checked and contiguous, and the value of tensor_scale. Reading that value waits
// for the weight's device. One level a group makes the shape uniform, which only the CPU's layout can be.
struct CanonicalWeight {
  WeightShape shape;
  Tensor codes, levels, scales;
  float tensor_scale;

  CanonicalWeight(const Tensor& codes_in, const Tensor& levels_in, const Tensor& scales_in,
                  const Tensor& tensor_scale_in, int64_t in_features, int64_t bits, int64_t group_size) {
    if (codes_in.dim() != 2) {
      fail("pack_weight: codes must have 2 dimensions, got shape " + shape_text(codes_in) +
           "; pass those of a PackedWeight");
    }
    shape = checked_shape("pack_weight", codes_in.size(0), in_features, bits, group_size);
    shape.uniform = codes_in.is_cpu() && levels_in.dim() == 3 && levels_in.size(2) == 1;
    const Device device = codes_in.device();
    check_tensor(codes_in, "pack_weight: codes", ScalarType::Byte, {shape.rows, shape.canonical_row_bytes()}, device);
    check_tensor(levels_in, "pack_weight: levels", ScalarType::Char,
                 {shape.rows, shape.groups(), shape.stored_levels()}, device);
    check_tensor(scales_in, "pack_weight: scales", ScalarType::Half, {shape.rows, shape.groups()}, device);
    check_tensor(tensor_scale_in, "pack_weight: tensor_scale", ScalarType::Float, {}, device);
    tensor_scale = *data<float>(torch::stable::to(tensor_scale_in, Device(torch::headeronly::DeviceType::CPU)));
    int exponent = 0;
    if (!(std::isfinite(tensor_scale) && tensor_scale > 0.0f && std::frexp(tensor_scale, &exponent) == 0.5f)) {
      fail("pack_weight: tensor_scale must be a positive finite power of two, got " + std::to_string(tensor_scale) +
           "; put the rest into scales");
    }
    codes = as_contiguous(codes_in);
    levels = as_contiguous(levels_in);
    scales = as_contiguous(scales_in);
  }
};

// Checks a blob of pack_weight as far as is possible without reading it.
inline void check_blob(const std::string& op, const Tensor& weight, const Device& device) {
  const std::string what = op + ": weight";
  if (!is_on(weight, device)) {
    fail(what + " must be on " + device_text(device) + " like x, got " + device_text(weight.device()) +
         "; move the layer with .to(), which packs its weight again, or pack the canonical weight there");
  }
  if (weight.scalar_type() != ScalarType::Byte || weight.dim() != 1 || !weight.is_contiguous()) {
    fail(what + " must be the contiguous 1-D uint8 tensor that pack_weight made, got " +
         torch::headeronly::toString(weight.scalar_type()) + " of shape " + shape_text(weight));
  }
}

inline FloatType checked_dequantize_type(ScalarType dtype) {
  const std::optional<FloatType> type = float_type_of(dtype);
  if (!type) {
    fail(std::string("dequantize: dtype must be float32, float16 or bfloat16, got ") +
         torch::headeronly::toString(dtype) + "; convert the result with .to()");
  }
  return *type;
}

}  // namespace rcp::binding
