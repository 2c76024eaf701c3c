// The host code of lut_linear's CUDA binding, compiled to run without a GPU: tools/host_path.py times it.
//
// Tensors of the emulated device (tests/emulated_device) pass for CUDA tensors. The CUDA runtime is
// runtime.cpp, which counts launches and does nothing else. Everything between is the code of the package.
#include "binding.h"
#include "binding/lut_linear.h"
#include "binding/walsh_transform.h"
#include "blob.h"
#include "lut_linear_kernels.h"

// The library registers its kernel for the emulated device.
#define CUDA PrivateUse1
#include "lut_linear.cu"
#undef CUDA

namespace {

// The operator's share of a call that the binding cannot change: its arguments, with nothing done and nothing
// allocated.
Tensor nothing(const Tensor& x, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t, int64_t, int64_t,
               int64_t, double, const std::optional<Tensor>&, const std::optional<Tensor>&, int64_t,
               const std::optional<Tensor>&) {
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY(host_path, m) {
  m.def(
      "nothing(Tensor x, Tensor weight, Tensor? bias, int out_features, int in_features, int bits, int "
      "group_size, int act_bits, float clip, Tensor? rotation_base, Tensor? rotation_permutation, int "
      "rotation_group, Tensor? input_order) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(host_path, PrivateUse1, m) {
  m.impl("nothing", TORCH_BOX(&nothing));
}

extern "C" __attribute__((visibility("default"))) int64_t host_path_blob_bytes(int64_t rows, int64_t columns,
                                                                               int64_t bits, int64_t group_size) {
  return rcp::binding::blob_bytes(rcp::binding::checked_shape("host_path", rows, columns, bits, group_size));
}
