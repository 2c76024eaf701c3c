#include "rcp/lut_linear.h"

#include <cmath>

#include "binding.h"
#include "binding/lut_linear.h"
#include "walsh_arguments.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

// rotation_group > 0: every run of so many inputs is first transformed as walsh_transform(x, scale=n**-0.5) does.
// input_order: column k of the weight belongs to input input_order[k].
Tensor lut_linear_cpu(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias_in,
                      int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits,
                      double clip, const std::optional<Tensor>& rotation_base,
                      const std::optional<Tensor>& rotation_permutation, int64_t rotation_group,
                      const std::optional<Tensor>& input_order) {
  LutLinearInputs checked(x_in, weight, bias_in, out_features, in_features, bits, group_size, act_bits, clip,
                          rotation_group, input_order, cpu_device);
  const float tensor_scale =
      check_packed("lut_linear", checked.shape, static_cast<const uint8_t*>(weight.const_data_ptr()), weight.numel());
  std::optional<WalshArguments> rotation;
  if (rotation_group != 0) {
    // The same pow as Python's n ** -0.5, so that the scale is the same to the last bit.
    rotation.emplace("lut_linear: rotation", x_in, rotation_base, rotation_permutation, rotation_group,
                     std::pow(static_cast<double>(rotation_group), -0.5), false);
  }
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  Tensor y = empty(with_last(x, out_features), x.scalar_type());
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
        fail("lut_linear: input_order must hold 0 to " + std::to_string(in_features - 1) + ", got " +
             std::to_string(a.input_order[k]) + "; pass the permutation of the inputs");
      }
    }
  }
  if (a.tokens > 0) rcp::lut_linear(a, current_isa(), torch_pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cpu));
}
