#include "binding/pack_weight.h"

#include "binding.h"
#include "rcp/cpu/pack_weight.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

// Checks a blob; sets the shape's `uniform` and returns the tensor_scale.
float checked_weight(const char* op, const Tensor& weight, WeightShape& shape) {
  check_blob(op, weight, cpu_device);
  return check_packed(op, shape, data<uint8_t>(weight), weight.numel());
}

// Memory for a blob. Reading several megabytes through 4 KB pages costs TLB misses, so a large blob starts on a 2 MB
// boundary and asks for 2 MB pages: on a Zen 5 server the 4096 x 4096 GEMV rises from 33.7 to 36.6 GB/s. The bytes that
// the alignment skips are never touched.
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

Tensor pack_weight_cpu(const Tensor& codes, const Tensor& levels, const Tensor& scales, const Tensor& tensor_scale,
                       int64_t in_features, int64_t bits, int64_t group_size) {
  const CanonicalWeight w(codes, levels, scales, tensor_scale, in_features, bits, group_size);
  Tensor packed = empty_weight(w.shape.packed_bytes());
  rcp::pack_weight(w.shape, data<uint8_t>(w.codes), data<int8_t>(w.levels), data<uint16_t>(w.scales), w.tensor_scale,
                   mutable_data<uint8_t>(packed), torch_pool());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack_weight_cpu(const Tensor& weight, int64_t out_features,
                                                             int64_t in_features, int64_t bits, int64_t group_size) {
  WeightShape shape = checked_shape("unpack_weight", out_features, in_features, bits, group_size);
  const float scale = checked_weight("unpack_weight", weight, shape);
  Tensor codes = empty({shape.rows, shape.canonical_row_bytes()}, ScalarType::Byte);
  Tensor levels = empty({shape.rows, shape.groups(), shape.levels()}, ScalarType::Char);
  Tensor scales = empty({shape.rows, shape.groups()}, ScalarType::Half);
  Tensor tensor_scale = empty({}, ScalarType::Float);
  *mutable_data<float>(tensor_scale) = scale;
  rcp::unpack_weight(shape, data<uint8_t>(weight), mutable_data<uint8_t>(codes), mutable_data<int8_t>(levels),
                     mutable_data<uint16_t>(scales), torch_pool());
  return {codes, levels, scales, tensor_scale};
}

Tensor dequantize_cpu(const Tensor& weight, int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size,
                      ScalarType dtype) {
  WeightShape shape = checked_shape("dequantize", out_features, in_features, bits, group_size);
  const FloatType type = checked_dequantize_type(dtype);
  const float scale = checked_weight("dequantize", weight, shape);
  Tensor y = empty({shape.rows, shape.columns}, dtype);
  rcp::dequantize(shape, data<uint8_t>(weight), scale, y.mutable_data_ptr(), type, current_isa(), torch_pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight_cpu));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_cpu));
  m.impl("dequantize", TORCH_BOX(&dequantize_cpu));
}
