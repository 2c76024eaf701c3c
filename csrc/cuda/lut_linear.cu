#include <algorithm>
#include <array>
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
// stream therefore has its own area, and so has each captured graph, which may be replayed beside any launch. Areas are
// cut from slabs that are never freed, because a graph may live as long as the process. An area is zeroed once, on the
// stream that uses it: in a graph that is one memory node, not one for each layer.
class Counters {
 public:
  // Counters for one launch. `own` keeps memory that is for this launch alone.
  static unsigned* get(const CudaCall& call, std::size_t needed, std::optional<Tensor>& own) {
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
    Area& area = mine.areas_[{call.stream, capturing}];
    // A new capture on the stream is another graph.
    if (area.capture == capture && area.bytes >= needed) return area.memory;
    // A power of two: a stream that meets larger and larger layers leaves no more bytes behind than it uses.
    std::size_t bytes = smallest_area;
    while (bytes < needed) bytes *= 2;
    if (mine.left_ < bytes && !capturing) {
      mine.left_ = std::max(slab_bytes, bytes);
      mine.slabs_.push_back(call.empty({static_cast<int64_t>(mine.left_)}, ScalarType::Byte));
      mine.next_ = static_cast<char*>(mine.slabs_.back().mutable_data_ptr());
      // The memory's previous user may still be running on this stream, and other streams do not wait for this one.
      check_cuda("lut_linear", cudaStreamSynchronize(call.stream));
    }
    if (mine.left_ < bytes) {
      // A capture without room in a slab: torch's memory, which a graph keeps.
      own = call.empty({static_cast<int64_t>(needed)}, ScalarType::Byte);
      void* memory = own->mutable_data_ptr();
      check_cuda("lut_linear", cudaMemsetAsync(memory, 0, needed, call.stream));
      return static_cast<unsigned*>(memory);
    }
    check_cuda("lut_linear", cudaMemsetAsync(mine.next_, 0, bytes, call.stream));
    area = {reinterpret_cast<unsigned*>(mine.next_), bytes, capture};
    mine.next_ += bytes;
    mine.left_ -= bytes;
    return area.memory;
  }

 private:
  // A layer of 4096 rows has at most 256 blocks, with a counter each.
  static constexpr std::size_t smallest_area = 1024, slab_bytes = 256 << 10;
  struct Area {
    unsigned* memory = nullptr;
    std::size_t bytes = 0;
    unsigned long long capture = 0;
  };
  std::vector<Tensor> slabs_;
  char* next_ = nullptr;
  std::size_t left_ = 0;
  std::map<std::pair<cudaStream_t, bool>, Area> areas_;  // true: the latest capture on the stream
};

// The plan of a call, made once for each shape, number of tokens and GPU that a thread meets. A place holds the plan of
// the last call that fell on it, which bounds the memory where lengths of prompts vary.
const rcp::cuda::LutLinearPlan& plan_of(const rcp::cuda::LutLinearCall& a, const CudaCall& call) {
  using Key = std::array<int64_t, 10>;
  struct Place {
    Key key{};  // of no call: a call has tokens
    rcp::cuda::LutLinearPlan plan{};
  };
  constexpr std::size_t places = 256;
  static thread_local std::vector<Place> cache(places);
  const Key key{a.tokens,         a.rows,
                a.columns,        a.bits,
                a.group_size,     a.act_bits,
                a.rotation_group, static_cast<int64_t>(a.x_type),
                call.sm_count,    call.compute_capability};
  uint64_t hash = 0;
  for (const int64_t field : key) hash = (hash ^ static_cast<uint64_t>(field)) * 0x9e3779b97f4a7c15u;
  Place& place = cache[hash >> 56];
  if (place.key != key) place = {key, rcp::cuda::plan_lut_linear(a, call.sm_count, call.compute_capability)};
  return place.plan;
}

// x with its last dimension in the order of the weight's columns.
Tensor reordered(const Tensor& x, const Tensor& input_order) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(x.dim() - 1), from(input_order)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// rcp_kernels.ops.lut_linear decides with the same rule (fuses_on_cuda), and itself transforms x otherwise.
void check_rotation(int64_t act_bits, const std::optional<Tensor>& base, int64_t group) {
  if (act_bits != 16 && !base.has_value() && (group == 32 || group == 64 || group == 128)) return;
  fail("lut_linear: on CUDA rotation_group must be 0, or 32, 64 or 128 without a base and with act_bits 4 or 8, got " +
       std::to_string(group) + (base.has_value() ? " with a base" : "") + " and act_bits " + std::to_string(act_bits) +
       "; call rcp_kernels.ops.lut_linear, or walsh_transform before the operator");
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
  if (rotation_group != 0) {
    check_walsh("lut_linear: rotation: ", in_features, rotation_base, rotation_permutation, rotation_group,
                call.device);
    check_rotation(act_bits, rotation_base, rotation_group);
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
  a.rotation_group = static_cast<int>(rotation_group);
  a.rotation_sequency = rotation_group != 0 && rotation_permutation.has_value();
  a.stream = call.stream;
  const rcp::cuda::LutLinearPlan& plan = plan_of(a, call);
  std::optional<Tensor> workspace, counters;
  if (plan.workspace_bytes() > 0) {
    workspace = call.empty({static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte);
    a.workspace = workspace->mutable_data_ptr();
  }
  if (plan.counter_bytes > 0) a.counters = Counters::get(call, plan.counter_bytes, counters);
  check_cuda("lut_linear", rcp::cuda::lut_linear(a, plan));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CUDA, m) {
  m.impl("lut_linear", TORCH_BOX(&lut_linear_cuda));
}
