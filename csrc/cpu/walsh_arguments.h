// The arguments of a Walsh transform.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "binding.h"
#include "rcp/cpu/walsh_transform.h"

namespace rcp::binding {

// The checked arguments of a transform, for the Walsh operators and for lut_linear's input rotation. Keeps the tensors
// that `transform` points into.
struct WalshArguments {
  std::optional<Tensor> base, permutation;
  WalshTransform transform{};

  // For tokens with this many columns.
  WalshArguments(const std::string& op, int64_t columns, const std::optional<Tensor>& base_in,
                 const std::optional<Tensor>& permutation_in, int64_t n, double scale, bool inverse) {
    const std::string where = op + ": ";
    if (n < 1 || columns % n != 0) {
      fail(where + "group_size must divide the last dimension of x (" + std::to_string(columns) + "), got " +
           std::to_string(n) + "; pass a divisor of it");
    }
    if (!std::isfinite(scale))
      fail(where + "scale must be finite, got " + std::to_string(scale) + "; n ** -0.5 makes the transform orthogonal");
    int64_t m = 1;
    if (base_in.has_value()) {
      if (base_in->dim() != 2)
        fail(where + "base must be a square matrix, got shape " + shape_text(*base_in) + "; see base_matrix");
      m = base_in->size(0);
      check_tensor(*base_in, where + "base", ScalarType::Float, {m, m});
      base = as_contiguous(*base_in);
    }
    if (permutation_in.has_value()) {
      check_tensor(*permutation_in, where + "permutation", ScalarType::Int, {n});
      permutation = as_contiguous(*permutation_in);
      const int32_t* p = data<int32_t>(*permutation);
      // The kernels index with it: an entry outside would read foreign memory.
      for (int64_t i = 0; m > 1 && i < n; ++i) {
        if (p[i] < 0 || p[i] >= n) {
          fail(where + "permutation must hold 0 .. " + std::to_string(n - 1) + ", got " + std::to_string(p[i]) +
               "; see sequency_permutation");
        }
      }
    }
    int bits = 0;
    while (bits < max_walsh_bits && m << (bits + 1) <= n) ++bits;
    if (m << bits != n) {
      fail(where + "group_size must be " + std::to_string(m) + " * 2^k with k <= " + std::to_string(max_walsh_bits) +
           ", got " + std::to_string(n) + "; pass a size that hadamard_matrix knows");
    }
    if (m == 1 && permutation.has_value() && n > 1) {
      // For m = 1 the kernels compute the sequency order themselves and support no other. Three entries identify it;
      // reading all of them would cost more than the transform.
      const int32_t* p = data<int32_t>(*permutation);
      if (p[0] != 0 || p[1] != n / 2 || sequency_of(static_cast<uint32_t>(p[n - 1]), bits) != n - 1) {
        fail(where + "permutation must be the sequency order of " + std::to_string(n) +
             " when there is no base, got another; see sequency_permutation");
      }
    }
    transform = {n,
                 m,
                 bits,
                 base ? data<float>(*base) : nullptr,
                 permutation ? data<int32_t>(*permutation) : nullptr,
                 static_cast<float>(scale),
                 inverse};
  }
};

}  // namespace rcp::binding
