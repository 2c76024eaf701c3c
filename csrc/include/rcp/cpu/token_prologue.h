// The norm or gated activation of a token before lut_linear, and the residual added after it. docs/numerics.md states
// every step: float32, in one order on every instruction set, rounded to the type of x where a model's own operators
// round. So the result is bit-equal to that of plain operators before and after the call.
#pragma once

#include <cmath>
#include <cstdint>

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp {

// y = x / rms(x) * (offset + weight)
struct RmsNorm {
  const void* weight;  // [columns]; null for no norm
  FloatType type;      // of weight
  float epsilon, offset;
};

// x holds [gate, up] side by side: y = activation(gate) * up
enum class GatedActivation : int { none = 0, silu = 1, gelu_tanh = 2 };

// Floats of working memory of a norm over n entries: half of n padded to a power of two.
inline int64_t rms_norm_work(int64_t n) {
  int64_t half = 16;
  while (2 * half < n) half *= 2;
  return half;
}

}  // namespace rcp

#include "rcp/cpu/kv_cache_scalar.h"
#if RCP_X86
#include "rcp/cpu/kv_cache_avx2.h"
#include "rcp/cpu/kv_cache_avx512.h"
#endif

namespace rcp {

namespace scalar::prologue {
using namespace rcp::scalar::kv;
#define RCP_PROLOGUE_TARGET
#include "rcp/cpu/token_prologue_vector.h"
#undef RCP_PROLOGUE_TARGET
}  // namespace scalar::prologue

#if RCP_X86
namespace avx2::prologue {
using namespace rcp::avx2::kv;
#define RCP_PROLOGUE_TARGET RCP_AVX2
#include "rcp/cpu/token_prologue_vector.h"
#undef RCP_PROLOGUE_TARGET
}  // namespace avx2::prologue

namespace avx512::prologue {
using namespace rcp::avx512::kv;
#define RCP_PROLOGUE_TARGET RCP_AVX512
#include "rcp/cpu/token_prologue_vector.h"
#undef RCP_PROLOGUE_TARGET
}  // namespace avx512::prologue
#endif

struct PrologueKernels {
  void (*rms_norm)(const RmsNorm& norm, const void* x, FloatType type, int64_t n, float* work, void* y);
  void (*gated_activation)(GatedActivation activation, const void* x, FloatType type, int64_t n, void* y);
  void (*add_to)(const void* x, FloatType type, int64_t n, void* y);  // y += x
};

inline PrologueKernels prologue_kernels(Isa isa) {
#if RCP_X86
  if (isa >= Isa::avx512) {
    return {avx512::prologue::rms_norm, avx512::prologue::gated_activation, avx512::prologue::add_to};
  }
  if (isa == Isa::avx2) {
    return {avx2::prologue::rms_norm, avx2::prologue::gated_activation, avx2::prologue::add_to};
  }
#endif
  (void)isa;
  return {scalar::prologue::rms_norm, scalar::prologue::gated_activation, scalar::prologue::add_to};
}

}  // namespace rcp
