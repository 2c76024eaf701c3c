// The arguments of a Walsh transform, checked for every device without reading the tensors.
#pragma once

#include "binding/tensors.h"

namespace rcp::binding {

// `where` begins the errors. n is the group_size, `columns` the features of a token.
inline void check_walsh(const std::string& where, int64_t columns, const std::optional<Tensor>& base,
                        const std::optional<Tensor>& permutation, int64_t n, const Device& device) {
  if (n < 1 || columns % n != 0) {
    fail(where + "group_size must divide the last dimension of x (" + std::to_string(columns) + "), got " +
         std::to_string(n) + "; pass a divisor of it");
  }
  if (base.has_value()) {
    if (base->dim() != 2) {
      fail(where + "base must be a square matrix, got shape " + shape_text(*base) + "; make it with base_matrix");
    }
    check_tensor(*base, where + "base", ScalarType::Float, {base->size(0), base->size(0)}, device);
  }
  if (permutation.has_value()) check_tensor(*permutation, where + "permutation", ScalarType::Int, {n}, device);
}

}  // namespace rcp::binding
