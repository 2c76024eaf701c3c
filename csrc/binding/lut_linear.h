// The arguments of lut_linear, checked for every device.
#pragma once

#include "binding/pack_weight.h"

namespace rcp::binding {

// Checked, but for the blob's contents and the rotation, which are the device's business.
struct LutLinearInputs {
  WeightShape shape;
  FloatType type;
  int act_bits;
  int64_t tokens;
  std::optional<Tensor> bias;  // contiguous
  FloatType bias_type = FloatType::float32;

  LutLinearInputs(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in, int64_t out_features,
                  int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits_in, double clip,
                  const Device& device)
      : shape(checked_shape("lut_linear", out_features, in_features, bits, group_size)),
        act_bits(static_cast<int>(act_bits_in)) {
    if (act_bits_in != 4 && act_bits_in != 8 && act_bits_in != 16) {
      fail("lut_linear: act_bits must be 4, 8 or 16, got " + std::to_string(act_bits_in) + "; 16 leaves x unquantized");
    }
    if (!(clip > 0.0 && clip <= 1.0))
      fail("lut_linear: clip must be in (0, 1], got " + std::to_string(clip) + "; 1.0 keeps the largest value");
    type = float_type(x, "lut_linear: x");
    if (x.dim() < 1 || x.size(x.dim() - 1) != in_features) {
      fail("lut_linear: the last dimension of x must be in_features (" + std::to_string(in_features) + "), got shape " +
           shape_text(x) + "; pass activations of the layer that this weight belongs to");
    }
    tokens = x.numel() / in_features;
    check_blob("lut_linear", weight, device);
    if (bias_in.has_value()) {
      bias_type = float_type(*bias_in, "lut_linear: bias");
      check_tensor(*bias_in, "lut_linear: bias", bias_in->scalar_type(), {out_features}, device);
      bias = torch::stable::contiguous(*bias_in);
    }
  }
};

}  // namespace rcp::binding
