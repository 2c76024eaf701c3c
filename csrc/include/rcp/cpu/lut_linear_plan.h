// The choice of a kernel of lut_linear.
#pragma once

#include "rcp/cpu/isa.h"
#include "rcp/cpu/lut_linear_call.h"
#include "rcp/cpu/lut_linear_scalar.h"
#if RCP_X86
#include "rcp/cpu/lut_linear_amx.h"
#include "rcp/cpu/lut_linear_avx2.h"
#include "rcp/cpu/lut_linear_avx512.h"
#include "rcp/cpu/lut_linear_avx512_bf16.h"
#endif

namespace rcp {

struct LutLinearPlan {
  LutLinearKernel kernel;
  ActivationOrder order = ActivationOrder::rows;
  int64_t tiles = 1;
  int64_t row_multiple = 1;  // q gets zero rows up to a multiple of this
  int64_t streams = 1;       // see LutLinearCall
};

namespace detail {

template <int BITS>
LutLinearPlan plan_for(Isa isa, int64_t tokens, int act_bits, FloatType type) {
  const bool integer = act_bits != 16;
#if RCP_X86
  // AMX from a full tile of 16 tokens on. With fewer its tiles are partly empty, and VNNI is as fast.
  if (isa == Isa::amx && integer && tokens >= 16) {
    return {amx::lut_linear_many<BITS, amx::AmxTiles>, ActivationOrder::rows, 1, 16};
  }
  if (isa >= Isa::avx512) {
    if (!integer) {
      static const bool bf16 = bf16_usable();
      if (bf16 && type == FloatType::bfloat16) return {avx512::lut_linear_bf16<BITS>, ActivationOrder::bf16};
      return {avx512::lut_linear_float<BITS>};
    }
    const int64_t tiles = (tokens + avx512::tile_tokens - 1) / avx512::tile_tokens;
    static const int64_t streams = is_intel() ? 4 : 1;
    return {avx512::lut_linear<BITS>, ActivationOrder::tiled, tiles, 1, streams};
  }
  if (isa == Isa::avx2) {
    if (!integer) return {avx2::lut_linear_float<BITS>};
    if (act_bits == 8) return {avx2::lut_linear_integer<BITS, 2>, ActivationOrder::planes};
    return {avx2::lut_linear_integer<BITS, 1>};
  }
#endif
  (void)isa;
  (void)tokens;
  (void)type;
  return {integer ? scalar::lut_linear<true> : scalar::lut_linear<false>};
}

}  // namespace detail

// type: the dtype of x.
inline LutLinearPlan lut_linear_plan(Isa isa, int bits, int64_t tokens, int act_bits, FloatType type) {
  if (bits == 2) return detail::plan_for<2>(isa, tokens, act_bits, type);
  if (bits == 3) return detail::plan_for<3>(isa, tokens, act_bits, type);
  return detail::plan_for<4>(isa, tokens, act_bits, type);
}

}  // namespace rcp
