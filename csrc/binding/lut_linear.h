// The arguments of lut_linear, checked for every device.
#pragma once

#include "binding/pack_weight.h"

namespace rcp::binding {

// The arguments, checked. Each device itself checks, as far as it can, the contents of the blob and of input_order, and
// the rotation. A token of x has inputs_per_column * in_features entries.
struct LutLinearInputs {
  WeightShape shape;
  FloatType type;
  int act_bits;
  int64_t tokens;
  std::optional<Tensor> bias;  // contiguous
  FloatType bias_type = FloatType::float32;
  std::optional<Tensor> input_order;  // contiguous

  LutLinearInputs(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in, int64_t out_features,
                  int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits_in, double clip,
                  int64_t rotation_group, const std::optional<Tensor>& input_order_in, const Device& device,
                  const char* op = "lut_linear", int64_t inputs_per_column = 1)
      : shape(checked_shape(op, out_features, in_features, bits, group_size)), act_bits(static_cast<int>(act_bits_in)) {
    const std::string where = std::string(op) + ": ";
    if (act_bits_in != 4 && act_bits_in != 8 && act_bits_in != 16) {
      fail(where + "act_bits must be 4, 8 or 16, got " + std::to_string(act_bits_in) + "; 16 leaves x unquantized");
    }
    check_clip(op, clip);
    type = float_type(x, where + "x");
    if (x.dim() < 1 || x.size(x.dim() - 1) != inputs_per_column * in_features) {
      fail(where + "the last dimension of x must be " + (inputs_per_column == 2 ? "twice " : "") + "in_features (" +
           std::to_string(in_features) + "), got shape " + shape_text(x) +
           "; pass activations of the layer that this weight belongs to");
    }
    tokens = x.numel() / (inputs_per_column * in_features);
    check_blob(op, weight, device);
    if (bias_in.has_value()) {
      bias_type = float_type(*bias_in, where + "bias");
      check_tensor(*bias_in, where + "bias", bias_in->scalar_type(), {out_features}, device);
      bias = as_contiguous(*bias_in);
    }
    if (input_order_in.has_value()) {
      if (rotation_group != 0) {
        fail(where + "input_order must be left out where rotation_group is not 0, got both with rotation_group " +
             std::to_string(rotation_group) + "; reorder x before the call");
      }
      check_tensor(*input_order_in, where + "input_order", ScalarType::Long, {in_features}, device);
      input_order = as_contiguous(*input_order_in);
    }
  }
};

}  // namespace rcp::binding
