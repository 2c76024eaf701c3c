#include "rcp/cpu/walsh_transform.h"

#include "quantize_tokens.h"
#include "walsh_arguments.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

Tensor walsh_transform_cpu(const Tensor& x_in, const std::optional<Tensor>& base,
                           const std::optional<Tensor>& permutation, int64_t group_size, double scale, bool inverse) {
  const FloatType type = float_type(x_in, "walsh_transform: x");
  const WalshArguments a("walsh_transform", last_size("walsh_transform", x_in), base, permutation, group_size, scale,
                         inverse);
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty(with_last(x, x.size(x.dim() - 1)), x.scalar_type());
  // A fresh output of 32 MB costs 8192 page faults, which take several times as long as the transform.
  advise_huge_pages(y.mutable_data_ptr(), y.numel() * static_cast<int64_t>(y.element_size()));
  walsh_transform(a.transform, x.const_data_ptr(), y.mutable_data_ptr(), type, x.numel() / group_size, current_isa(),
                  torch_pool());
  return y;
}

void walsh_transform_in_place_cpu(Tensor x, const std::optional<Tensor>& base, const std::optional<Tensor>& permutation,
                                  int64_t group_size, double scale, bool inverse) {
  const FloatType type = float_type(x, "walsh_transform_: x");
  const WalshArguments a("walsh_transform_", last_size("walsh_transform_", x), base, permutation, group_size, scale,
                         inverse);
  if (!x.is_contiguous()) {
    fail("walsh_transform_: x must be contiguous to be transformed in place, got shape " + shape_text(x) +
         " with other strides; use walsh_transform, or x.contiguous()");
  }
  void* data = x.mutable_data_ptr();
  walsh_transform(a.transform, data, data, type, x.numel() / group_size, current_isa(), torch_pool());
}

std::tuple<Tensor, Tensor> walsh_quantize_cpu(const Tensor& x_in, const std::optional<Tensor>& base,
                                              const std::optional<Tensor>& permutation, int64_t group_size,
                                              double scale, bool inverse, int64_t bits, double clip, bool packed) {
  const FloatType type = float_type(x_in, "walsh_quantize: x");
  check_quantization("walsh_quantize", bits, clip, packed);
  const WalshArguments a("walsh_quantize", last_size("walsh_quantize", x_in), base, permutation, group_size, scale,
                         inverse);
  const Tensor x = as_contiguous(x_in);
  return quantize_tokens("walsh_quantize", x, type, static_cast<int>(bits), static_cast<float>(clip), packed,
                         &a.transform);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("walsh_transform", TORCH_BOX(&walsh_transform_cpu));
  m.impl("walsh_transform_", TORCH_BOX(&walsh_transform_in_place_cpu));
  m.impl("walsh_quantize", TORCH_BOX(&walsh_quantize_cpu));
}
