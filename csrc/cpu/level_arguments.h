// What kmeans_levels and clip_search take, checked.
#pragma once

#include <optional>

#include "binding.h"
#include "rcp/cpu/level_groups.h"

namespace rcp::binding {

// The tensors, contiguous, and the pointers into them.
class LevelArguments {
 public:
  LevelArguments(const std::string& op, const Tensor& groups, int64_t count, const std::optional<Tensor>& importance)
      : op_(op), values_(groups) {
    if (groups.dim() != 2 || groups.size(1) == 0) {
      fail(op + ": groups must be [groups, length] with length at least 1, got " + shape_text(groups) +
           "; reshape to one group a row");
    }
    check_tensor(groups, op + ": groups", ScalarType::Float, {groups.size(0), groups.size(1)});
    if (count < 2 || count > max_levels) {
      fail(op + ": count must be between 2 and " + std::to_string(max_levels) + " levels, got " +
           std::to_string(count) + "; pass 2**bits");
    }
    if (groups.size(1) >= std::numeric_limits<int32_t>::max()) {
      fail(op + ": a group must have fewer than 2^31 - 1 weights, got " + std::to_string(groups.size(1)) +
           "; use smaller groups");
    }
    values_ = torch::stable::contiguous(groups);
    g.values = static_cast<const float*>(values_.const_data_ptr());
    g.groups = groups.size(0);
    g.length = groups.size(1);
    if (importance.has_value()) {
      check_tensor(*importance, op + ": importance", ScalarType::Float, {g.groups, g.length});
      importance_ = torch::stable::contiguous(*importance);
      g.importance = static_cast<const float*>(importance_->const_data_ptr());
    }
  }

  void check(const FirstBad& bad) const {
    if (!bad.any()) return;
    fail(op_ + ": groups must be finite" + (g.importance ? ", importance finite and at least 0" : "") + ", but group " +
         std::to_string(bad.first()) + " is not; check the checkpoint for overflow");
  }

  LevelGroups g{};

 private:
  std::string op_;
  Tensor values_;
  std::optional<Tensor> importance_;
};

}  // namespace rcp::binding
