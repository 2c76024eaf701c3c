#include "rcp/lut_linear.h"

#include <cmath>

#include "binding.h"
#include "walsh_arguments.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

WeightShape checked_shape(const char* op, int64_t rows, int64_t columns, int64_t bits, int64_t group_size) {
  // 2^40 bounds every product of sizes below; anything else outside int is outside the format's bits too.
  constexpr int64_t largest = int64_t{1} << 40;
  if (rows > largest || columns > largest || rows * (columns / 4096 + 1) > largest / 64) {
    fail(std::string(op) + ": out_features * in_features must stay below 2^46, got " + std::to_string(rows) + " and " +
         std::to_string(columns) + "; these cannot be a layer's sizes");
  }
  const WeightShape shape{rows, columns, group_size, bits < 0 || bits > 4 ? 0 : static_cast<int>(bits)};
  if (shape.bits != bits)
    fail(std::string(op) + ": bits must be 2, 3 or 4, got " + std::to_string(bits) +
         "; quantize the weight to one of them");
  shape.check(op);
  return shape;
}

// The blob's header, checked against the arguments; returns tensor_scale.
float checked_weight(const char* op, const Tensor& weight, const WeightShape& shape) {
  const std::string what = std::string(op) + ": weight";
  if (!weight.is_cpu()) fail(what + " must be on the CPU like x; repack it for the CPU from its canonical form");
  if (weight.scalar_type() != ScalarType::Byte || weight.dim() != 1 || !weight.is_contiguous()) {
    fail(what + " must be the contiguous 1-D uint8 tensor that pack_weight made, got " +
         torch::headeronly::toString(weight.scalar_type()) + " of shape " + shape_text(weight));
  }
  return check_packed(op, shape, static_cast<const uint8_t*>(weight.const_data_ptr()), weight.numel());
}

// Memory for a weight. Streaming several megabytes through 4 KB pages costs TLB misses, so a large weight starts on a 2
// MB boundary and asks for 2 MB pages: on a Zen 5 server the 4096 x 4096 GEMV rises from 33.7 to 36.6 GB/s. What the
// alignment skips is never touched.
Tensor empty_weight(int64_t bytes) {
  constexpr int64_t huge = int64_t{2} << 20;
  if (bytes < 2 * huge) return empty({bytes}, ScalarType::Byte);
  Tensor room = empty({bytes + huge - 64}, ScalarType::Byte);
  const int64_t skip =
      (huge - static_cast<int64_t>(reinterpret_cast<uintptr_t>(room.mutable_data_ptr()) % huge)) % huge;
  Tensor weight = torch::stable::narrow(room, 0, skip, bytes);
  advise_huge_pages(weight.mutable_data_ptr(), bytes);
  return weight;
}

Tensor pack_weight_cpu(const Tensor& codes_in, const Tensor& levels_in, const Tensor& scales_in,
                       const Tensor& tensor_scale, int64_t in_features, int64_t bits, int64_t group_size) {
  if (codes_in.dim() != 2)
    fail("pack_weight: codes must have 2 dimensions, got shape " + shape_text(codes_in) +
         "; pass those of a PackedWeight");
  const WeightShape shape = checked_shape("pack_weight", codes_in.size(0), in_features, bits, group_size);
  check_tensor(codes_in, "pack_weight: codes", ScalarType::Byte, {shape.rows, shape.canonical_row_bytes()});
  check_tensor(levels_in, "pack_weight: levels", ScalarType::Char, {shape.rows, shape.groups(), shape.levels()});
  check_tensor(scales_in, "pack_weight: scales", ScalarType::Half, {shape.rows, shape.groups()});
  check_tensor(tensor_scale, "pack_weight: tensor_scale", ScalarType::Float, {});
  const float whole = *static_cast<const float*>(tensor_scale.const_data_ptr());
  int exponent = 0;
  if (!(std::isfinite(whole) && whole > 0.0f && std::frexp(whole, &exponent) == 0.5f)) {
    fail("pack_weight: tensor_scale must be a positive finite power of two, got " + std::to_string(whole) +
         "; put the rest into scales");
  }
  const Tensor codes = torch::stable::contiguous(codes_in), levels = torch::stable::contiguous(levels_in),
               scales = torch::stable::contiguous(scales_in);
  Tensor packed = empty_weight(shape.packed_bytes());
  rcp::pack_weight(shape, static_cast<const uint8_t*>(codes.const_data_ptr()),
                   static_cast<const int8_t*>(levels.const_data_ptr()),
                   static_cast<const uint16_t*>(scales.const_data_ptr()), whole,
                   static_cast<uint8_t*>(packed.mutable_data_ptr()), torch_pool());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack_weight_cpu(const Tensor& weight, int64_t out_features,
                                                             int64_t in_features, int64_t bits, int64_t group_size) {
  const WeightShape shape = checked_shape("unpack_weight", out_features, in_features, bits, group_size);
  const float whole = checked_weight("unpack_weight", weight, shape);
  Tensor codes = empty({shape.rows, shape.canonical_row_bytes()}, ScalarType::Byte);
  Tensor levels = empty({shape.rows, shape.groups(), shape.levels()}, ScalarType::Char);
  Tensor scales = empty({shape.rows, shape.groups()}, ScalarType::Half);
  Tensor tensor_scale = empty({}, ScalarType::Float);
  *static_cast<float*>(tensor_scale.mutable_data_ptr()) = whole;
  rcp::unpack_weight(shape, static_cast<const uint8_t*>(weight.const_data_ptr()),
                     static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<int8_t*>(levels.mutable_data_ptr()),
                     static_cast<uint16_t*>(scales.mutable_data_ptr()), torch_pool());
  return {codes, levels, scales, tensor_scale};
}

// rotation_group > 0: every run of so many inputs is first transformed as walsh_transform(x, scale=n**-0.5) does.
Tensor lut_linear_cpu(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias_in,
                      int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits,
                      double clip, const std::optional<Tensor>& rotation_base,
                      const std::optional<Tensor>& rotation_permutation, int64_t rotation_group) {
  const WeightShape shape = checked_shape("lut_linear", out_features, in_features, bits, group_size);
  if (act_bits != 4 && act_bits != 8 && act_bits != 16) {
    fail("lut_linear: act_bits must be 4, 8 or 16, got " + std::to_string(act_bits) + "; 16 leaves x unquantized");
  }
  if (!(clip > 0.0 && clip <= 1.0))
    fail("lut_linear: clip must be in (0, 1], got " + std::to_string(clip) + "; 1.0 keeps the largest value");
  const FloatType type = float_type(x_in, "lut_linear: x");
  if (x_in.dim() < 1 || x_in.size(x_in.dim() - 1) != in_features) {
    fail("lut_linear: the last dimension of x must be in_features (" + std::to_string(in_features) + "), got shape " +
         shape_text(x_in) + "; pass activations of the layer that this weight belongs to");
  }
  const float tensor_scale = checked_weight("lut_linear", weight, shape);
  std::optional<WalshArguments> rotation;
  if (rotation_group != 0) {
    // The same pow as Python's n ** -0.5, so that the scale is the same to the last bit.
    rotation.emplace("lut_linear: rotation", x_in, rotation_base, rotation_permutation, rotation_group,
                     std::pow(static_cast<double>(rotation_group), -0.5), false);
  }
  std::optional<Tensor> bias;
  if (bias_in.has_value()) {
    float_type(*bias_in, "lut_linear: bias");
    check_tensor(*bias_in, "lut_linear: bias", bias_in->scalar_type(), {out_features});
    bias = torch::stable::contiguous(*bias_in);
  }
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  Tensor y = empty(with_last(x, out_features), x.scalar_type());
  LutLinearArguments a{};
  a.shape = shape;
  a.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.tensor_scale = tensor_scale;
  a.x = x.const_data_ptr();
  a.type = type;
  a.tokens = x.numel() / in_features;
  a.act_bits = static_cast<int>(act_bits);
  a.clip = static_cast<float>(clip);
  if (bias.has_value()) {
    a.bias = bias->const_data_ptr();
    a.bias_type = float_type(*bias, "lut_linear: bias");
  }
  a.y = y.mutable_data_ptr();
  a.rotation = rotation ? &rotation->transform : nullptr;
  if (a.tokens > 0) rcp::lut_linear(a, current_isa(), torch_pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight_cpu));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_cpu));
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cpu));
}
