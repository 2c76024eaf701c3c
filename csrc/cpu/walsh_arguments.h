// The arguments of a Walsh transform on the CPU.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "binding.h"
#include "binding/walsh_transform.h"
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
    check_walsh(where, columns, base_in, permutation_in, n, cpu_device);
    if (!std::isfinite(scale)) {
      fail(where + "scale must be finite, got " + std::to_string(scale) + "; n ** -0.5 makes the transform orthogonal");
    }
    transform.n = n;
    transform.m = 1;
    transform.scale = static_cast<float>(scale);
    transform.inverse = inverse;
    if (base_in.has_value()) {
      base = as_contiguous(*base_in);
      transform.m = base->size(0);
      transform.base = data<float>(*base);
    }
    while (transform.bits < max_walsh_bits && transform.m << (transform.bits + 1) <= n) ++transform.bits;
    if (transform.m << transform.bits != n) {
      fail(where + "group_size must be " + std::to_string(transform.m) + " * 2^k with k <= " +
           std::to_string(max_walsh_bits) + ", got " + std::to_string(n) + "; pass a size that hadamard_matrix knows");
    }
    if (permutation_in.has_value()) {
      permutation = as_contiguous(*permutation_in);
      transform.permutation = data<int32_t>(*permutation);
      check_permutation(where);
    }
  }

 private:
  void check_permutation(const std::string& where) const {
    const int32_t* p = transform.permutation;
    const int64_t n = transform.n;
    // For m = 1 the kernels compute the sequency order themselves and support no other. Three entries identify it;
    // reading all of them would cost more than the transform.
    if (transform.m == 1 && n > 1 &&
        (p[0] != 0 || p[1] != n / 2 || sequency_of(static_cast<uint32_t>(p[n - 1]), transform.bits) != n - 1)) {
      fail(where + "permutation must be the sequency order of " + std::to_string(n) +
           " when there is no base, got another; make it with sequency_permutation");
    }
    // The kernels index with it: an entry outside would read foreign memory.
    for (int64_t i = 0; transform.m > 1 && i < n; ++i) {
      if (p[i] < 0 || p[i] >= n) {
        fail(where + "permutation must hold 0 .. " + std::to_string(n - 1) + ", got " + std::to_string(p[i]) +
             "; make it with sequency_permutation");
      }
    }
  }
};

}  // namespace rcp::binding
