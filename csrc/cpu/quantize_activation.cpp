#include "rcp/cpu/quantize_activation.h"

#include "quantize_tokens.h"

namespace {

using namespace rcp::binding;

std::tuple<Tensor, Tensor> quantize_activation_cpu(const Tensor& x, int64_t bits, double clip, bool packed) {
  const rcp::FloatType type = check_quantize_activation(x, bits, clip, packed);
  return quantize_tokens("quantize_activation", as_contiguous(x), type, static_cast<int>(bits),
                         static_cast<float>(clip), packed, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_cpu));
}
