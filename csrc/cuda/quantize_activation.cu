#include "rcp/cuda/quantize_activation.cuh"

#include "binding.h"
#include "binding/quantize_activation.h"

namespace {

using namespace rcp::binding;

std::tuple<Tensor, Tensor> quantize_activation_cuda(const Tensor& x_in, int64_t bits, double clip, bool packed) {
  const rcp::FloatType type = check_quantize_activation(x_in, bits, clip, packed);
  const CudaCall call("quantize_activation", x_in, "x");
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const int64_t columns = x.size(x.dim() - 1);
  Tensor q =
      call.empty(with_last(x, packed ? (columns + 1) / 2 : columns), packed ? ScalarType::Byte : ScalarType::Char);
  std::vector<int64_t> lead = with_last(x, 1);
  lead.pop_back();
  Tensor scale = call.empty(lead, ScalarType::Float);
  rcp::cuda::QuantizeActivationCall a{};
  a.x = x.const_data_ptr();
  a.x_type = type;
  a.tokens = scale.numel();
  a.columns = columns;
  a.bits = static_cast<int>(bits);
  a.packed = packed;
  a.clip = static_cast<float>(clip);
  a.q = q.mutable_data_ptr();
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  a.stream = call.stream;
  check_cuda("quantize_activation", rcp::cuda::quantize_activation(a));
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CUDA, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_cuda));
}
