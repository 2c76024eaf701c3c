// What the bindings of all ops share: torch's thread pool, checks whose errors read the same everywhere.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "rcp/float_types.h"
#include "rcp/parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rcp::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ThreadPool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int workers, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context);
            });
          }};
}

[[noreturn]] inline void fail(const std::string& message) {
  throw std::invalid_argument(message);
}

inline FloatType float_type(const Tensor& t, const std::string& what) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::float32;
    case ScalarType::Half:
      return FloatType::float16;
    case ScalarType::BFloat16:
      return FloatType::bfloat16;
    default:
      fail(what + " must be float32, float16 or bfloat16, got " + torch::headeronly::toString(t.scalar_type()) +
           "; convert it with .to()");
  }
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline void check_tensor(const Tensor& t, const std::string& what, ScalarType dtype,
                         const std::vector<int64_t>& shape) {
  if (!t.is_cpu()) fail(what + " must be on the CPU like the other arguments; move it with .cpu()");
  if (t.scalar_type() != dtype) {
    fail(what + " must be " + torch::headeronly::toString(dtype) + ", got " +
         torch::headeronly::toString(t.scalar_type()) + "; store it unconverted");
  }
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted = "[";
  for (std::size_t d = 0; d < shape.size(); ++d) {
    same = same && t.size(static_cast<int64_t>(d)) == shape[d];
    wanted += (d ? ", " : "") + std::to_string(shape[d]);
  }
  if (!same)
    fail(what + " must have shape " + wanted + "], got " + shape_text(t) + "; pass the one of the same layer, whole");
}

// Asks for 2 MB pages where the memory holds some, which saves page faults and TLB misses. Advice only: it changes
// nothing where the kernel does not follow it.
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

// The shape of x with its last dimension replaced.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(last);
  return shape;
}

}  // namespace rcp::binding
