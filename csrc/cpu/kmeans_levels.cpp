#include "rcp/cpu/kmeans_levels.h"

#include "level_arguments.h"

namespace {

using namespace rcp::binding;

Tensor kmeans_levels_cpu(const Tensor& groups, int64_t count, const std::optional<Tensor>& importance) {
  return with_groups("kmeans_levels", groups, count, importance, count, rcp::kmeans_levels);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("kmeans_levels", TORCH_BOX(&kmeans_levels_cpu));
}
