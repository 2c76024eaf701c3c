// kmeans_levels and clip_search, which take the same arguments.
#include <optional>

#include "binding.h"
#include "rcp/cpu/clip_search.h"
#include "rcp/cpu/kmeans_levels.h"

namespace {

using namespace rcp::binding;

// Checks the arguments and runs op(groups, output, bad) into a new float32 [groups, width].
template <class Op>
Tensor run(const std::string& name, const Tensor& groups, int64_t count, const std::optional<Tensor>& importance,
           int64_t width, const Op& op) {
  if (groups.dim() != 2 || groups.size(1) == 0) {
    fail(name + ": groups must be [groups, length] with length at least 1, got " + shape_text(groups) +
         "; reshape to one group a row");
  }
  rcp::LevelGroups g{nullptr, nullptr, groups.size(0), groups.size(1)};
  check_tensor(groups, name + ": groups", ScalarType::Float, {g.groups, g.length});
  if (count < 2 || count > rcp::max_levels) {
    fail(name + ": count must be between 2 and " + std::to_string(rcp::max_levels) + " levels, got " +
         std::to_string(count) + "; pass 2**bits");
  }
  if (g.length >= std::numeric_limits<int32_t>::max()) {
    fail(name + ": a group must have fewer than 2^31 - 1 weights, got " + std::to_string(g.length) +
         "; use smaller groups");
  }
  const Tensor values = as_contiguous(groups);
  g.values = data<float>(values);
  std::optional<Tensor> weights;
  if (importance.has_value()) {
    check_tensor(*importance, name + ": importance", ScalarType::Float, {g.groups, g.length});
    weights = as_contiguous(*importance);
    g.importance = data<float>(*weights);
  }
  Tensor out = empty({g.groups, width}, ScalarType::Float);
  rcp::FirstIndex bad;
  op(g, mutable_data<float>(out), bad);
  if (bad.any()) {
    fail(name + ": groups must be finite" + (g.importance ? ", importance finite and at least 0" : "") +
         ", but group " + std::to_string(bad.value()) + " is not; check the checkpoint for overflow");
  }
  return out;
}

Tensor kmeans_levels_cpu(const Tensor& groups, int64_t count, const std::optional<Tensor>& importance) {
  return run("kmeans_levels", groups, count, importance, count,
             [&](const rcp::LevelGroups& g, float* levels, rcp::FirstIndex& bad) {
               rcp::kmeans_levels(g, static_cast<int>(count), levels, bad, rcp::current_isa(), torch_pool());
             });
}

Tensor clip_search_cpu(const Tensor& groups, int64_t count, const std::optional<Tensor>& importance) {
  return run("clip_search", groups, count, importance, 2,
             [&](const rcp::LevelGroups& g, float* ratios, rcp::FirstIndex& bad) {
               rcp::clip_search(g, static_cast<int>(count), ratios, bad, rcp::current_isa(), torch_pool());
             });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("kmeans_levels", TORCH_BOX(&kmeans_levels_cpu));
  m.impl("clip_search", TORCH_BOX(&clip_search_cpu));
}
