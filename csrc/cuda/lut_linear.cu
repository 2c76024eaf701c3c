#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "binding.h"
#include "binding/lut_linear.h"
#include "binding/walsh_transform.h"
#include "blob.h"
#include "lut_linear_kernels.h"

namespace {

using namespace rcp::binding;

// The kernels' counters: zero before a launch, zero after it. Launches that may overlap must not share them. Each
// stream therefore has its own slice, and so has each captured graph, which may be replayed beside any launch. Slices
// are cut from slabs that are never freed, because a graph may live as long as the process. A slice is zeroed once, on
// the stream that uses it: in a graph that is one memory node, not one for each layer.
class Counters {
 public:
  // Counters for one launch. `own` keeps memory that is for this launch alone.
  static unsigned* get(const CudaCall& call, std::size_t bytes, std::optional<Tensor>& own) {
    if (bytes == 0) return nullptr;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    check_cuda("lut_linear", cudaStreamGetCaptureInfo(call.stream, &status, &capture));
    const bool capturing = status == cudaStreamCaptureStatusActive;
    if (!capturing) capture = 0;
    // Never destroyed: at the end of the process the CUDA runtime is destroyed first.
    static auto* all = new std::map<int, Counters>;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    Counters& mine = (*all)[call.device.index()];
    if (mine.used_ == slab_slices && !capturing) {
      mine.slabs_.push_back(call.empty({slab_slices * slice_bytes}, ScalarType::Byte));
      mine.used_ = 0;
      // The memory's previous user may still be running on this stream, and other streams do not wait for this one.
      check_cuda("lut_linear", cudaStreamSynchronize(call.stream));
    }
    const auto found = mine.slices_.find({call.stream, capture});
    if (bytes <= slice_bytes && found != mine.slices_.end()) return found->second;
    void* memory = nullptr;
    if (bytes > slice_bytes || mine.used_ == slab_slices) {
      // Too large for a slice, or a capture before any other call: torch's memory, which a graph keeps.
      own = call.empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
      memory = own->mutable_data_ptr();
    } else {
      memory = static_cast<char*>(mine.slabs_.back().mutable_data_ptr()) + mine.used_++ * slice_bytes;
      bytes = slice_bytes;
    }
    check_cuda("lut_linear", cudaMemsetAsync(memory, 0, bytes, call.stream));
    if (!own.has_value()) mine.slices_[{call.stream, capture}] = static_cast<unsigned*>(memory);
    return static_cast<unsigned*>(memory);
  }

 private:
  // A counter for 16 rows or more: the vocabulary of a language model fits.
  static constexpr int64_t slice_bytes = 64 << 10, slab_slices = 32;
  std::vector<Tensor> slabs_;
  int64_t used_ = slab_slices;
  std::map<std::pair<cudaStream_t, unsigned long long>, unsigned*> slices_;
};

// Calls the op walsh_transform, whose CUDA kernel is written in Triton.
Tensor transformed(const Tensor& x, const std::optional<Tensor>& base, const std::optional<Tensor>& permutation,
                   int64_t group) {
  using torch::stable::detail::from;
  // The same pow as Python's n ** -0.5: the scale is the same to the last bit.
  const double scale = std::pow(static_cast<double>(group), -0.5);
  std::array<StableIValue, 6> stack{from(x), from(base), from(permutation), from(group), from(scale), from(false)};
  if (torch_call_dispatcher("rcp_kernels::walsh_transform", "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw std::runtime_error(
        "lut_linear: rotation: groups other than 32, 64 and 128 are rotated by walsh_transform, which failed with the "
        "error printed above, got rotation_group " +
        std::to_string(group) + "; install Triton (pip install triton)");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x with its last dimension in the order of the weight's columns.
Tensor reordered(const Tensor& x, const Tensor& input_order) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(x.dim() - 1), from(input_order)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor lut_linear_cuda(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
                       int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size, int64_t act_bits,
                       double clip, const std::optional<Tensor>& rotation_base,
                       const std::optional<Tensor>& rotation_permutation, int64_t rotation_group,
                       const std::optional<Tensor>& input_order) {
  const CudaCall call("lut_linear", x_in, "x");
  const LutLinearInputs checked(x_in, weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
                                rotation_group, input_order, call.device);
  check_blob_size("lut_linear", weight, checked.shape);
  Tensor x = checked.input_order.has_value() ? reordered(x_in, *checked.input_order) : x_in;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  bool fused = false;
  if (rotation_group != 0) {
    check_walsh("lut_linear: rotation: ", in_features, rotation_base, rotation_permutation, rotation_group,
                call.device);
    fused = act_bits != 16 && !rotation_base.has_value() &&
            (rotation_group == 32 || rotation_group == 64 || rotation_group == 128);
    if (!fused && x.numel() > 0) x = transformed(x, rotation_base, rotation_permutation, rotation_group);
  }
  Tensor y = call.empty(with_last(x, out_features), x.scalar_type());
  if (checked.tokens == 0) return y;

  rcp::cuda::LutLinearCall a{};
  a.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  a.x = x.const_data_ptr();
  a.x_type = checked.type;
  if (checked.bias.has_value()) {
    a.bias = checked.bias->const_data_ptr();
    a.bias_type = checked.bias_type;
  }
  a.y = y.mutable_data_ptr();
  a.tokens = checked.tokens;
  a.rows = checked.shape.rows;
  a.columns = checked.shape.columns;
  a.bits = checked.shape.bits;
  a.group_size = static_cast<int>(checked.shape.group_size);
  a.act_bits = checked.act_bits;
  a.clip = static_cast<float>(clip);
  a.rotation_group = fused ? static_cast<int>(rotation_group) : 0;
  a.rotation_sequency = fused && rotation_permutation.has_value();
  a.stream = call.stream;
  const rcp::cuda::LutLinearPlan plan = rcp::cuda::plan_lut_linear(a, call.sm_count, call.compute_capability);
  std::optional<Tensor> workspace, counters;
  if (plan.workspace_bytes() > 0) {
    workspace = call.empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte);
    a.workspace = workspace->mutable_data_ptr();
  }
  a.counters = Counters::get(call, plan.counter_bytes, counters);
  check_cuda("lut_linear", rcp::cuda::lut_linear(a, plan));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CUDA, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cuda));
}
