// The arguments of kmeans_levels and clip_search.
#pragma once

#include <optional>

#include "binding.h"
#include "rcp/cpu/level_groups.h"

namespace rcp::binding {

using LevelOp = void(const LevelGroups& g, int count, float* out, FirstIndex& bad, Isa isa, const ThreadPool& pool);

// Checks the arguments and runs `op` into a new float32 [groups, width].
inline Tensor with_groups(const std::string& name, const Tensor& groups, int64_t count,
                          const std::optional<Tensor>& importance, int64_t width, LevelOp* op) {
  if (groups.dim() != 2 || groups.size(1) == 0) {
    fail(name + ": groups must be [groups, length] with length at least 1, got " + shape_text(groups) +
         "; reshape to one group a row");
  }
  LevelGroups g{nullptr, nullptr, groups.size(0), groups.size(1)};
  check_tensor(groups, name + ": groups", ScalarType::Float, {g.groups, g.length});
  if (count < 2 || count > max_levels) {
    fail(name + ": count must be between 2 and " + std::to_string(max_levels) + " levels, got " +
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
  FirstIndex bad;
  op(g, static_cast<int>(count), mutable_data<float>(out), bad, current_isa(), torch_pool());
  if (bad.any()) {
    fail(name + ": groups must be finite" + (g.importance ? ", importance finite and at least 0" : "") +
         ", but group " + std::to_string(bad.value()) + " is not; check the checkpoint for overflow");
  }
  return out;
}

}  // namespace rcp::binding
