#include "rcp/cpu/lut_linear.h"

#include <cmath>

#include "binding.h"
#include "binding/lut_linear.h"
#include "walsh_arguments.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

// The arguments that only lut_linear_fused has.
struct Fused {
  std::optional<Tensor> norm_weight, residual;
  double norm_eps = 0.0, norm_offset = 0.0;
  GatedActivation activation = GatedActivation::none;
};

// The kernels index x with the order: an entry outside would read foreign memory.
const int64_t* checked_order(const std::string& op, const Tensor& input_order) {
  const int64_t* order = data<int64_t>(input_order);
  for (int64_t k = 0; k < input_order.numel(); ++k) {
    if (order[k] < 0 || order[k] >= input_order.numel()) {
      fail(op + ": input_order must hold 0 to " + std::to_string(input_order.numel() - 1) + ", got " +
           std::to_string(order[k]) + "; pass the permutation of the inputs");
    }
  }
  return order;
}

void check_fused(int64_t activation, const std::optional<Tensor>& norm_weight, double norm_eps, double norm_offset) {
  const std::string op = "lut_linear_fused";
  if (activation < 0 || activation > 2) {
    fail(op + ": activation must be 0 (none), 1 (silu) or 2 (gelu_tanh), got " + std::to_string(activation) +
         "; apply another one before the call");
  }
  if (activation != 0 && norm_weight.has_value()) {
    fail(op + ": activation must be 0 (none) beside a norm_weight, got " + std::to_string(activation) +
         "; apply one of the two before the call");
  }
  if (!(norm_eps >= 0.0 && std::isfinite(norm_eps)) || !std::isfinite(norm_offset)) {
    fail(op + ": norm_eps must be finite and at least 0, and norm_offset finite, got " + std::to_string(norm_eps) +
         " and " + std::to_string(norm_offset) + "; pass those of the norm");
  }
}

// rotation_group > 0: each run of so many inputs is transformed first, as by walsh_transform with scale n**-0.5.
// input_order: column k of the weight belongs to input input_order[k].
Tensor run(const char* op, const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
           int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits, double clip,
           const std::optional<Tensor>& rotation_base, const std::optional<Tensor>& rotation_permutation,
           int64_t rotation_group, const std::optional<Tensor>& input_order, const Fused& fused) {
  const std::string where = std::string(op) + ": ";
  LutLinearInputs checked(x_in, weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
                          rotation_group, input_order, cpu_device, op,
                          fused.activation == GatedActivation::none ? 1 : 2);
  LutLinear a{};
  a.packed = data<uint8_t>(weight);
  a.tensor_scale = check_packed(op, checked.shape, a.packed, weight.numel());
  a.shape = checked.shape;
  a.type = checked.type;
  a.tokens = checked.tokens;
  a.act_bits = checked.act_bits;
  a.clip = static_cast<float>(clip);
  a.activation = fused.activation;
  if (checked.bias.has_value()) a.bias = checked.bias->const_data_ptr();
  a.bias_type = checked.bias_type;
  if (checked.input_order.has_value()) a.input_order = checked_order(op, *checked.input_order);
  std::optional<WalshArguments> rotation;
  if (rotation_group != 0) {
    // The same pow as Python's n ** -0.5: the scales are equal to the last bit.
    rotation.emplace(where + "rotation", in_features, rotation_base, rotation_permutation, rotation_group,
                     std::pow(static_cast<double>(rotation_group), -0.5), false);
    a.rotation = &rotation->transform;
  }
  std::optional<Tensor> norm_weight, residual;
  if (fused.norm_weight.has_value()) {
    const FloatType type = float_type(*fused.norm_weight, where + "norm_weight");
    check_tensor(*fused.norm_weight, where + "norm_weight", fused.norm_weight->scalar_type(), {in_features});
    norm_weight = as_contiguous(*fused.norm_weight);
    a.norm = {norm_weight->const_data_ptr(), type, static_cast<float>(fused.norm_eps),
              static_cast<float>(fused.norm_offset)};
  }
  const std::vector<int64_t> y_shape = with_last(x_in, out_features);
  if (fused.residual.has_value()) {
    check_tensor(*fused.residual, where + "residual", x_in.scalar_type(), y_shape);
    residual = as_contiguous(*fused.residual);
    a.residual = residual->const_data_ptr();
  }
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty(y_shape, x.scalar_type());
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  if (a.tokens > 0) rcp::lut_linear(a, current_isa(), torch_pool());
  return y;
}

Tensor lut_linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                      int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits, double clip,
                      const std::optional<Tensor>& rotation_base, const std::optional<Tensor>& rotation_permutation,
                      int64_t rotation_group, const std::optional<Tensor>& input_order) {
  return run("lut_linear", x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip, rotation_base,
             rotation_permutation, rotation_group, input_order, Fused{});
}

Tensor lut_linear_fused_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size,
                            int64_t act_bits, double clip, const std::optional<Tensor>& rotation_base,
                            const std::optional<Tensor>& rotation_permutation, int64_t rotation_group,
                            const std::optional<Tensor>& input_order, const std::optional<Tensor>& norm_weight,
                            double norm_eps, double norm_offset, int64_t activation,
                            const std::optional<Tensor>& residual) {
  check_fused(activation, norm_weight, norm_eps, norm_offset);
  return run("lut_linear_fused", x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
             rotation_base, rotation_permutation, rotation_group, input_order,
             {norm_weight, residual, norm_eps, norm_offset, static_cast<GatedActivation>(activation)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cpu));
  m.impl("lut_linear_fused", TORCH_BOX(&lut_linear_fused_cpu));
}
