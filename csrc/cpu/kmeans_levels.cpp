#include "rcp/cpu/kmeans_levels.h"

#include "level_arguments.h"

namespace {

using namespace rcp::binding;

Tensor kmeans_levels_cpu(const Tensor& groups, int64_t count, const std::optional<Tensor>& importance) {
  const LevelArguments a("kmeans_levels", groups, count, importance);
  Tensor levels = empty({a.g.groups, count}, ScalarType::Float);
  rcp::FirstBad bad(a.g.groups);
  rcp::kmeans_levels(a.g, static_cast<int>(count), static_cast<float*>(levels.mutable_data_ptr()), bad,
                     rcp::current_isa(), torch_pool());
  a.check(bad);
  return levels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("kmeans_levels", TORCH_BOX(&kmeans_levels_cpu));
}
