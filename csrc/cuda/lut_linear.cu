#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "binding.h"
#include "binding/lut_linear.h"
#include "blob.h"
#include "lut_linear_kernels.h"

namespace {

using namespace rcp::binding;

// The kernels' counters: zero before a launch, zero after it. Two launches that may overlap must not share them, so
// each stream has its own, and so has each captured graph, which may be replayed beside anything. They are cut from
// slabs that are never given back (a graph may live as long as the process), and zeroed once, on the stream that uses
// them: in a graph that is one memory node, not one for each layer.
class Counters {
 public:
  // For one launch; `own` holds counters that are for this launch alone.
  static void* get(const CudaCall& call, std::size_t bytes, std::optional<Tensor>& own) {
    if (bytes == 0) return nullptr;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    check_cuda("lut_linear", cudaStreamGetCaptureInfo(call.stream, &status, &capture));
    const bool capturing = status == cudaStreamCaptureStatusActive;
    if (!capturing) capture = 0;
    // Never destroyed: at the end of the process the CUDA runtime goes before this would.
    static auto* all = new std::map<int, Counters>;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    Counters& mine = (*all)[call.device.index()];
    if (mine.used_ == slab_lanes && !capturing) {
      mine.slabs_.push_back(call.empty({slab_lanes * lane_bytes}, ScalarType::Byte));
      mine.used_ = 0;
      // What had this memory before us may still be running on this stream, which other streams do not wait for.
      check_cuda("lut_linear", cudaStreamSynchronize(call.stream));
    }
    const auto found = mine.lanes_.find({call.stream, capture});
    if (bytes <= lane_bytes && found != mine.lanes_.end()) return found->second;
    if (bytes > lane_bytes || mine.used_ == slab_lanes) {
      // A capture that no call came before, or a giant: memory of torch's, which a graph keeps as its own.
      own = call.empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
      void* data = own->mutable_data_ptr();
      check_cuda("lut_linear", cudaMemsetAsync(data, 0, bytes, call.stream));
      return data;
    }
    void* lane = static_cast<char*>(mine.slabs_.back().mutable_data_ptr()) + mine.used_++ * lane_bytes;
    check_cuda("lut_linear", cudaMemsetAsync(lane, 0, lane_bytes, call.stream));
    mine.lanes_[{call.stream, capture}] = lane;
    return lane;
  }

 private:
  // A word for 16 rows: the vocabulary of a language model fits.
  static constexpr int64_t lane_bytes = 64 << 10, slab_lanes = 32;
  std::vector<Tensor> slabs_;
  int64_t used_ = slab_lanes;
  std::map<std::pair<cudaStream_t, unsigned long long>, void*> lanes_;
};

// What csrc/cpu checks of a rotation, as far as it can be seen without waiting for the device.
void check_rotation(const Tensor& x, const std::optional<Tensor>& base, const std::optional<Tensor>& permutation,
                    int64_t group, const Device& device) {
  const int64_t columns = x.size(x.dim() - 1);
  if (group < 1 || columns % group != 0) {
    fail("lut_linear: rotation: group_size must divide the last dimension of x (" + std::to_string(columns) +
         "), got " + std::to_string(group) + "; pass a divisor of it");
  }
  if (base.has_value()) {
    if (base->dim() != 2) {
      fail("lut_linear: rotation: base must be a square matrix, got shape " + shape_text(*base) + "; see base_matrix");
    }
    check_tensor(*base, "lut_linear: rotation: base", ScalarType::Float, {base->size(0), base->size(0)}, device);
  }
  if (permutation.has_value()) {
    check_tensor(*permutation, "lut_linear: rotation: permutation", ScalarType::Int, {group}, device);
  }
}

// The op walsh_transform, whose CUDA kernel is Triton's.
Tensor transformed(const Tensor& x, const std::optional<Tensor>& base, const std::optional<Tensor>& permutation,
                   int64_t group) {
  using torch::stable::detail::from;
  // The same pow as Python's n ** -0.5, so that the scale is the same to the last bit.
  const double scale = std::pow(static_cast<double>(group), -0.5);
  std::array<StableIValue, 6> stack{from(x), from(base), from(permutation), from(group), from(scale), from(false)};
  if (torch_call_dispatcher("rcp_kernels::walsh_transform", "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw std::runtime_error(
        "lut_linear: rotation: the CUDA kernels rotate groups of 32, 64 and 128 themselves and leave others to "
        "walsh_transform, which failed with the error printed above, got rotation_group " +
        std::to_string(group) + "; it needs Triton (pip install triton)");
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
    check_rotation(x, rotation_base, rotation_permutation, rotation_group, call.device);
    fused = act_bits != 16 && !rotation_base.has_value() &&
            (rotation_group == 32 || rotation_group == 64 || rotation_group == 128);
    if (!fused && x.numel() > 0) x = transformed(x, rotation_base, rotation_permutation, rotation_group);
  }
  Tensor y = call.empty(with_last(x, out_features), x.scalar_type());
  if (checked.tokens == 0) return y;

  rcp::cuda::LutLinearArguments a{};
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
  std::optional<Tensor> workspace, counters;
  const std::size_t bytes = rcp::cuda::lut_linear_workspace_bytes(a, call.sm_count);
  if (bytes > 0) {
    workspace = call.empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
    a.workspace = workspace->mutable_data_ptr();
  }
  a.counters = Counters::get(call, rcp::cuda::lut_linear_counter_bytes(a, call.sm_count), counters);
  check_cuda("lut_linear", rcp::cuda::lut_linear(a, call.sm_count, call.compute_capability));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CUDA, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cuda));
}
