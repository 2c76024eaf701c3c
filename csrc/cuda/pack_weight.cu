#include "rcp/cuda/pack_weight.cuh"

#include "binding.h"
#include "binding/pack_weight.h"
#include "blob.h"

namespace {

using namespace rcp::binding;

Tensor pack_weight_cuda(const Tensor& codes, const Tensor& levels, const Tensor& scales, const Tensor& tensor_scale,
                        int64_t in_features, int64_t bits, int64_t group_size) {
  const CudaCall call("pack_weight", codes, "codes");
  const CanonicalWeight w(codes, levels, scales, tensor_scale, in_features, bits, group_size);
  Tensor blob = call.empty({blob_bytes(w.shape)}, ScalarType::Byte);
  rcp::cuda::PackWeightCall a{};
  a.codes = static_cast<const uint8_t*>(w.codes.const_data_ptr());
  a.levels = static_cast<const int8_t*>(w.levels.const_data_ptr());
  a.scales = static_cast<const uint16_t*>(w.scales.const_data_ptr());
  a.tensor_scale = w.tensor_scale;
  a.blob = static_cast<uint8_t*>(blob.mutable_data_ptr());
  a.layout = cuda_layout(w.shape);
  a.stream = call.stream;
  // The tail is never read. It is zeroed, and two packs of a weight are equal.
  const int64_t used = a.layout.total_bytes();
  check_cuda("pack_weight", cudaMemsetAsync(a.blob + used, 0, blob_bytes(w.shape) - used, call.stream));
  check_cuda("pack_weight", rcp::cuda::pack_weight(a));
  return blob;
}

// Waits for the device to check the header: a layer is unpacked to be saved or moved, not to compute.
std::tuple<Tensor, Tensor, Tensor, Tensor> unpack_weight_cuda(const Tensor& weight, int64_t out_features,
                                                              int64_t in_features, int64_t bits, int64_t group_size) {
  const CudaCall call("unpack_weight", weight, "weight");
  const rcp::WeightShape shape = checked_shape("unpack_weight", out_features, in_features, bits, group_size);
  check_blob("unpack_weight", weight, call.device);
  check_blob_size("unpack_weight", weight, shape);
  check_header("unpack_weight", weight, shape);
  Tensor codes = call.empty({shape.rows, shape.canonical_row_bytes()}, ScalarType::Byte);
  Tensor levels = call.empty({shape.rows, shape.groups(), shape.levels()}, ScalarType::Char);
  Tensor scales = call.empty({shape.rows, shape.groups()}, ScalarType::Half);
  Tensor tensor_scale = call.empty({}, ScalarType::Float);
  rcp::cuda::UnpackWeightCall a{};
  a.blob = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  a.levels = static_cast<int8_t*>(levels.mutable_data_ptr());
  a.scales = static_cast<uint16_t*>(scales.mutable_data_ptr());
  a.tensor_scale = static_cast<float*>(tensor_scale.mutable_data_ptr());
  a.layout = cuda_layout(shape);
  a.stream = call.stream;
  check_cuda("unpack_weight", rcp::cuda::unpack_weight(a));
  return {codes, levels, scales, tensor_scale};
}

// Part of a backward pass, so it does not wait: a wrong header gives NaN.
Tensor dequantize_cuda(const Tensor& weight, int64_t out_features, int64_t in_features, int64_t bits,
                       int64_t group_size, ScalarType dtype) {
  const CudaCall call("dequantize", weight, "weight");
  const rcp::WeightShape shape = checked_shape("dequantize", out_features, in_features, bits, group_size);
  const rcp::FloatType type = checked_dequantize_type(dtype);
  check_blob("dequantize", weight, call.device);
  check_blob_size("dequantize", weight, shape);
  Tensor y = call.empty({shape.rows, shape.columns}, dtype);
  rcp::cuda::DequantizeCall a{};
  a.blob = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.y = y.mutable_data_ptr();
  a.y_type = type;
  a.layout = cuda_layout(shape);
  a.stream = call.stream;
  check_cuda("dequantize", rcp::cuda::dequantize(a));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CUDA, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight_cuda));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_cuda));
  m.impl("dequantize", TORCH_BOX(&dequantize_cuda));
}
