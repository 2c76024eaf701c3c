#include "rcp/cpu/lut_linear.h"

#include <cmath>

#include "binding.h"
#include "binding/lut_linear.h"
#include "walsh_arguments.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

// What lut_linear_fused does beside lut_linear. Default: nothing.
struct Fused {
  const char* op = "lut_linear";
  std::optional<Tensor> norm_weight, residual;
  double norm_eps = 0.0, norm_offset = 0.0;
  GatedActivation activation = GatedActivation::none;
};

// rotation_group > 0: every run of so many inputs is first transformed as walsh_transform(x, scale=n**-0.5) does.
// input_order: column k of the weight belongs to input input_order[k].
Tensor run(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias_in, int64_t out_features,
           int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits, double clip,
           const std::optional<Tensor>& rotation_base, const std::optional<Tensor>& rotation_permutation,
           int64_t rotation_group, const std::optional<Tensor>& input_order, const Fused& fused) {
  const char* op = fused.op;
  const int64_t inputs_per_column = fused.activation == GatedActivation::none ? 1 : 2;
  LutLinearInputs checked(x_in, weight, bias_in, out_features, in_features, bits, group_size, act_bits, clip,
                          rotation_group, input_order, cpu_device, op, inputs_per_column);
  const float tensor_scale =
      check_packed(op, checked.shape, static_cast<const uint8_t*>(weight.const_data_ptr()), weight.numel());
  std::optional<WalshArguments> rotation;
  if (rotation_group != 0) {
    // The same pow as Python's n ** -0.5, so that the scale is the same to the last bit.
    rotation.emplace(std::string(op) + ": rotation", in_features, rotation_base, rotation_permutation, rotation_group,
                     std::pow(static_cast<double>(rotation_group), -0.5), false);
  }
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const std::vector<int64_t> y_shape = with_last(x, out_features);
  Tensor y = empty(y_shape, x.scalar_type());
  LutLinearArguments a{};
  a.shape = checked.shape;
  a.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.tensor_scale = tensor_scale;
  a.x = x.const_data_ptr();
  a.type = checked.type;
  a.tokens = checked.tokens;
  a.act_bits = checked.act_bits;
  a.clip = static_cast<float>(clip);
  if (checked.bias.has_value()) {
    a.bias = checked.bias->const_data_ptr();
    a.bias_type = checked.bias_type;
  }
  a.y = y.mutable_data_ptr();
  a.rotation = rotation ? &rotation->transform : nullptr;
  if (checked.input_order.has_value()) {
    a.input_order = static_cast<const int64_t*>(checked.input_order->const_data_ptr());
    // The kernels index x with it: an entry outside would read memory that is not ours.
    for (int64_t k = 0; k < in_features; ++k) {
      if (a.input_order[k] < 0 || a.input_order[k] >= in_features) {
        fail(std::string(op) + ": input_order must hold 0 to " + std::to_string(in_features - 1) + ", got " +
             std::to_string(a.input_order[k]) + "; pass the permutation of the inputs");
      }
    }
  }
  a.activation = fused.activation;
  std::optional<Tensor> norm_weight, residual;
  if (fused.norm_weight.has_value()) {
    const std::string what = std::string(op) + ": norm_weight";
    const FloatType type = float_type(*fused.norm_weight, what);
    check_tensor(*fused.norm_weight, what, fused.norm_weight->scalar_type(), {in_features});
    norm_weight = torch::stable::contiguous(*fused.norm_weight);
    a.norm = {norm_weight->const_data_ptr(), type, static_cast<float>(fused.norm_eps),
              static_cast<float>(fused.norm_offset)};
  }
  if (fused.residual.has_value()) {
    check_tensor(*fused.residual, std::string(op) + ": residual", x.scalar_type(), y_shape);
    residual = torch::stable::contiguous(*fused.residual);
    a.residual = residual->const_data_ptr();
  }
  if (a.tokens > 0) rcp::lut_linear(a, current_isa(), torch_pool());
  return y;
}

Tensor lut_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                      int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits, double clip,
                      const std::optional<Tensor>& rotation_base, const std::optional<Tensor>& rotation_permutation,
                      int64_t rotation_group, const std::optional<Tensor>& input_order) {
  return run(x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip, rotation_base,
             rotation_permutation, rotation_group, input_order, Fused{});
}

Tensor lut_linear_fused_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size,
                            int64_t act_bits, double clip, const std::optional<Tensor>& rotation_base,
                            const std::optional<Tensor>& rotation_permutation, int64_t rotation_group,
                            const std::optional<Tensor>& input_order, const std::optional<Tensor>& norm_weight,
                            double norm_eps, double norm_offset, int64_t activation,
                            const std::optional<Tensor>& residual) {
  if (activation < 0 || activation > 2) {
    fail("lut_linear_fused: activation must be 0 (none), 1 (silu) or 2 (gelu_tanh), got " + std::to_string(activation) +
         "; apply another one before the call");
  }
  if (activation != 0 && norm_weight.has_value()) {
    fail("lut_linear_fused: activation must be 0 (none) beside a norm_weight, got " + std::to_string(activation) +
         "; apply one of the two before the call");
  }
  if (!(norm_eps >= 0.0 && std::isfinite(norm_eps)) || !std::isfinite(norm_offset)) {
    fail("lut_linear_fused: norm_eps must be finite and at least 0, and norm_offset finite, got " +
         std::to_string(norm_eps) + " and " + std::to_string(norm_offset) + "; pass those of the norm");
  }
  return run(
      x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip, rotation_base, rotation_permutation,
      rotation_group, input_order,
      {"lut_linear_fused", norm_weight, residual, norm_eps, norm_offset, static_cast<GatedActivation>(activation)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cpu));
  m.impl("lut_linear_fused", TORCH_BOX(&lut_linear_fused_cpu));
}
