// The norm or gated activation of a token before lut_linear, and the residual that is added after it. docs/numerics.md
// states every step. Steps are float32, in one order on every instruction set, and round to the type of x where a
// model's own operators round. The result is bit-equal to plain operators before and after the call.
#pragma once

#include <cmath>
#include <cstdint>

#include "rcp/cpu/lanes16.h"
#include "rcp/float_types.h"

namespace rcp {

// y = x / rms(x) * (offset + weight)
struct RmsNorm {
  const void* weight;  // [columns]; null for no norm
  FloatType type;      // of weight
  float epsilon, offset;
};

// A token holds [gate, up] side by side: y = activation(gate) * up
enum class GatedActivation : int { none = 0, silu = 1, gelu_tanh = 2 };

// Floats of working memory that a norm over n entries needs: half of n padded to a power of two.
inline int64_t rms_norm_work(int64_t n) {
  int64_t half = 16;
  while (2 * half < n) half *= 2;
  return half;
}

// By the type of x and y. n is the number of entries of y.
struct PrologueKernels {
  ByType<void(const RmsNorm& norm, const void* x, int64_t n, float* work, void* y)> rms_norm;
  ByType<void(GatedActivation activation, const void* x, int64_t n, void* y)> gated_activation;
  ByType<void(const void* x, int64_t n, void* y)> add_to;  // y += x
};

}  // namespace rcp

#define RCP_KERNELS "rcp/cpu/token_prologue_vector.h"
#include "rcp/cpu/each_isa.h"
