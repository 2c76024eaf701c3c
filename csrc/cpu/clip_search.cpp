#include "rcp/cpu/clip_search.h"

#include "level_arguments.h"

namespace {

using namespace rcp::binding;

Tensor clip_search_cpu(const Tensor& groups, int64_t count, const std::optional<Tensor>& importance) {
  return with_groups("clip_search", groups, count, importance, 2, rcp::clip_search);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("clip_search", TORCH_BOX(&clip_search_cpu));
}
