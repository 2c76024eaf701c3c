// Shared by the CPU bindings of all operators: torch's thread pool, and memory.
#pragma once

#include <vector>

#include "binding/tensors.h"
#include "rcp/cpu/isa.h"
#include "rcp/cpu/parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rcp::binding {

inline const Device cpu_device(torch::headeronly::DeviceType::CPU);

inline void check_tensor(const Tensor& t, const std::string& what, ScalarType dtype,
                         const std::vector<int64_t>& shape) {
  check_tensor(t, what, dtype, shape, cpu_device);
}

inline ThreadPool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int workers, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context);
            });
          }};
}

// Advises the OS to use 2 MB pages, which saves page faults and TLB misses.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

// A count of positions that is stated from `held` on, or from 0.
inline int64_t positions_from(const std::string& op, const std::optional<Tensor>& held, int64_t count) {
  if (!held.has_value()) return count;
  if (!held->is_cpu() || held->scalar_type() != ScalarType::Long || held->dim() != 0) {
    fail(op + ": held must be int64 without dimensions on the CPU, got " +
         torch::headeronly::toString(held->scalar_type()) + " " + shape_text(*held) + " on " +
         device_text(held->device()) + "; use torch.tensor(0)");
  }
  return *data<int64_t>(*held) + count;
}

}  // namespace rcp::binding
