#include "rcp/cpu/clip_search.h"

#include "level_arguments.h"

namespace {

using namespace rcp::binding;

Tensor clip_search_cpu(const Tensor& groups, int64_t count, const std::optional<Tensor>& importance) {
  const LevelArguments a("clip_search", groups, count, importance);
  Tensor ratios = empty({a.g.groups, 2}, ScalarType::Float);
  rcp::FirstBad bad(a.g.groups);
  rcp::clip_search(a.g, static_cast<int>(count), static_cast<float*>(ratios.mutable_data_ptr()), bad,
                   rcp::current_isa(), torch_pool());
  a.check(bad);
  return ratios;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("clip_search", TORCH_BOX(&clip_search_cpu));
}
