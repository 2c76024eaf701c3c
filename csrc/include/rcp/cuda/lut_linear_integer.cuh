// Launcher of lut_linear for act_bits 4 and 8.
//
//   1 token             one launch, quantizing inside it; with a rotation as 2 to 16 tokens: every block would have to
//                       rotate the whole token to know its maximum, 14 % of a 4096 x 4096 layer's instructions at the
//                       least (7 additions a value, 64 blocks), where one small launch before takes 0.5 %
//   2 to 16 tokens      one small launch that rotates and quantizes, then the GEMV kernel
//   more                the same, then the GEMM kernel
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "rcp/cuda/lut_linear_arguments.h"
#include "rcp/cuda/lut_linear_gemm.cuh"
#include "rcp/cuda/lut_linear_gemv.cuh"
#include "rcp/cuda/lut_linear_plan.h"
#include "rcp/cuda/lut_linear_quantize.cuh"
#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda {

namespace integer {

// Row tiles a block, few and many. One token: 4 makes 64 blocks of 4096 rows, so that quantizing it in each costs 10 %
// of the instructions. 2 to 8 tokens: 32 KB of activations a block and 4096 columns, so more rows share them, as many
// as registers allow. Other groups than 128: one size only, to keep the kernels few.
inline constexpr int tiles_few = 2;
constexpr int tiles_many(int token_tiles, int bits, int slot) {
  return slot != 128 || token_tiles == 2 ? 2 : token_tiles == 1 && bits == 2 ? 6 : 4;
}
// The most tokens of the GEMV kernels: with large tables, registers allow no second tile of tokens.
constexpr int few_tokens(int bits, int64_t group_size) {
  return bits == 4 || (bits == 3 && group_size == 32) ? 8 : 16;
}

inline CudaLayout layout_of(const LutLinearArguments& a) {
  return {a.rows, a.columns, a.group_size, a.bits};
}
inline bool is_one_token(const LutLinearArguments& a) {
  return a.tokens == 1 && a.rotation_group == 0;
}
// Tiles of 8 tokens that the GEMV kernel multiplies by; 0 for one token.
inline int gemv_token_tiles(const LutLinearArguments& a) {
  return is_one_token(a) ? 0 : a.tokens <= 8 ? 1 : 2;
}
inline bool is_gemv(const LutLinearArguments& a) {
  return a.tokens <= few_tokens(a.bits, a.group_size);
}

inline GemvPlan plan_of(const LutLinearArguments& a, int sm_count) {
  const CudaLayout layout = layout_of(a);
  const int token_tiles = gemv_token_tiles(a), per_tile = token_tiles == 0 ? 256 : 512 * token_tiles;
  return plan_gemv(layout, sm_count, token_tiles == 0, tiles_few,
                   tiles_many(token_tiles, a.bits, a.group_size == 128 ? 128 : 0), token_tiles == 0 ? unit_columns : 0,
                   gemv_warps * per_tile, token_tiles * 8 * unit_columns);
}

// Workspace: token scales, fragments, partial sums; each area a multiple of 256 bytes.
struct Workspace {
  size_t scales, fragments, partial_sums;
  size_t total() const { return scales + fragments + partial_sums; }
};
inline Workspace workspace_of(const LutLinearArguments& a, int sm_count) {
  const auto whole = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  const CudaLayout layout = layout_of(a);
  Workspace w{0, 0, 0};
  if (!is_one_token(a)) {
    const size_t token_tiles = static_cast<size_t>((a.tokens + 7) / 8);
    w.scales = whole(token_tiles * 8 * sizeof(float));
    w.fragments = token_tiles * static_cast<size_t>(layout.sub_blocks()) * 1024;
  }
  if (is_gemv(a)) {
    const GemvPlan plan = plan_of(a, sm_count);
    const int outputs = is_one_token(a) ? tile_rows : 128 * gemv_token_tiles(a);
    if (plan.splits > 1) {
      w.partial_sums = whole(static_cast<size_t>(plan.splits) * static_cast<size_t>(layout.row_tiles()) *
                             static_cast<size_t>(outputs) * sizeof(int));
    }
  }
  return w;
}

template <class Kernel>
cudaError_t launch_gemv(Kernel kernel, const GemvProblem& p, int tiles, size_t shared, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.row_tiles + tiles - 1) / tiles), static_cast<unsigned>(p.splits));
  kernel<<<grid, 32 * gemv_warps, shared, stream>>>(p);
  return cudaGetLastError();
}

template <int BITS, int SLOT, int TYPE>
cudaError_t one_token(const GemvProblem& p, const GemvPlan& plan, cudaStream_t stream) {
  const auto shared = static_cast<size_t>(4 * activation::block_max_words + gemv_warps * plan.tiles * 256 +
                                          plan.units_per_split * unit_columns);
  constexpr int few = tiles_few, many = tiles_many(0, BITS, SLOT);
  if (plan.tiles == few) return launch_gemv(lut_linear_one_token<BITS, SLOT, TYPE, few>, p, few, shared, stream);
  return launch_gemv(lut_linear_one_token<BITS, SLOT, TYPE, many>, p, many, shared, stream);
}

template <int BITS, int SLOT, int NT>
cudaError_t several_tokens(const GemvProblem& p, const GemvPlan& plan, cudaStream_t stream) {
  const auto shared = static_cast<size_t>(64 + gemv_warps * plan.tiles * 512 * NT);
  constexpr int few = tiles_few, many = tiles_many(NT, BITS, SLOT);
  if (plan.tiles == few) return launch_gemv(lut_linear_few_tokens<BITS, SLOT, NT, few>, p, few, shared, stream);
  return launch_gemv(lut_linear_few_tokens<BITS, SLOT, NT, many>, p, many, shared, stream);
}

template <int BITS, int SLOT>
cudaError_t many_tokens(const GemvProblem& p, cudaStream_t stream) {
  GemmProblem problem{p, (p.tokens + 7) / 8};
  const dim3 grid(static_cast<unsigned>((problem.token_tiles + gemm_token_tiles - 1) / gemm_token_tiles),
                  static_cast<unsigned>((p.row_tiles + gemm_warps - 1) / gemm_warps));
  constexpr size_t shared = 2 * fragments::Part<BITS, SLOT>::sub_blocks * gemm_token_tiles * 1024;
  static_assert(shared <= 48 * 1024);
  lut_linear_many_tokens<BITS, SLOT><<<grid, 32 * gemm_warps, shared, stream>>>(problem);
  return cudaGetLastError();
}

template <int SLOT, int TYPE = any_type>
cudaError_t quantize(const QuantizeTokensProblem& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.tokens + 7) / 8 * 8);
  lut_linear_quantize_tokens<SLOT, TYPE><<<blocks, quantize_tokens_threads, 0, stream>>>(p);
  return cudaGetLastError();
}

// Calls f with the type of x, TYPE if that says it, as a std::integral_constant.
template <int TYPE, class F>
cudaError_t with_type(FloatType type, const F& f) {
  if constexpr (TYPE != any_type) {
    return f(std::integral_constant<int, TYPE>{});
  } else {
    if (type == FloatType::float32) return f(std::integral_constant<int, static_cast<int>(FloatType::float32)>{});
    if (type == FloatType::float16) return f(std::integral_constant<int, static_cast<int>(FloatType::float16)>{});
    return f(std::integral_constant<int, static_cast<int>(FloatType::bfloat16)>{});
  }
}

template <int BITS, int SLOT, int TYPE>
cudaError_t launch(const LutLinearArguments& a, int sm_count) {
  const CudaLayout layout = layout_of(a);
  const Workspace areas = workspace_of(a, sm_count);
  auto* workspace = static_cast<uint8_t*>(a.workspace);
  const float qmax = a.act_bits == 4 ? 7.0f : 127.0f;

  GemvProblem p{};
  p.weight = a.weight;
  p.stamp = layout.stamp();
  p.x = a.x;
  p.bias = a.bias;
  p.y = a.y;
  p.bias_type = a.bias_type;
  p.y_type = a.x_type;
  p.rows = a.rows;
  p.columns = static_cast<int>(a.columns);
  p.tile_bytes = static_cast<int>(layout.tile_bytes());
  p.row_tiles = static_cast<int>(layout.row_tiles());
  p.units = static_cast<int>(layout.units());
  p.tail_sub_blocks = layout.sub_blocks_of(layout.units() - 1);
  p.tokens = static_cast<int>(a.tokens);
  p.clip = a.clip;
  p.qmax = qmax;
  p.qmax_inverse = 1.0f / qmax;
  p.qmax_inverse_high = a.act_bits == 4 ? 0x1.24924ap-3f : 0x1.02040ap-7f;
  p.qmax_inverse_low = a.act_bits == 4 ? -0x1.b6db6ep-28f : -0x1.efdfcp-31f;
  p.token_scales = reinterpret_cast<const float*>(workspace);
  p.fragments = reinterpret_cast<const uint4*>(workspace + areas.scales);
  p.partial_sums = reinterpret_cast<int*>(workspace + areas.scales + areas.fragments);
  p.counters = static_cast<unsigned*>(a.counters);

  GemvPlan plan{1, 1, p.units};
  if (is_gemv(a)) {
    plan = plan_of(a, sm_count);
    p.units_per_split = plan.units_per_split;
    p.splits = plan.splits;
    // A block is whole if all its tiles exist, and the last unit of the columns has all its sub-blocks.
    p.whole_blocks = p.tail_sub_blocks == unit_sub_blocks ? p.row_tiles / plan.tiles : 0;
  }
  const bool two_pieces = a.columns == 4096 && a.clip == 1.0f && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  if (is_one_token(a)) {
    if constexpr (SLOT == 128) {
      if (two_pieces && plan.splits == 1) {
        return with_type<TYPE>(a.x_type, [&](auto type) { return one_token<BITS, SLOT, type>(p, plan, a.stream); });
      }
    }
    return one_token<BITS, SLOT, any_type>(p, plan, a.stream);
  }
  const QuantizeTokensProblem tokens{a.x,
                                     a.x_type,
                                     workspace + areas.scales,
                                     reinterpret_cast<float*>(workspace),
                                     a.tokens,
                                     p.columns,
                                     static_cast<int>(layout.sub_blocks()),
                                     a.clip,
                                     p.qmax,
                                     p.qmax_inverse,
                                     p.qmax_inverse_high,
                                     p.qmax_inverse_low,
                                     a.rotation_group,
                                     a.rotation_sequency};
  constexpr int slot = SLOT == 0 ? 128 : SLOT;
  cudaError_t error = cudaSuccess;
  if (slot == 128 && two_pieces && a.rotation_group == 0) {
    error = with_type<TYPE>(a.x_type, [&](auto type) { return quantize<128, type>(tokens, a.stream); });
  } else {
    error = quantize<slot>(tokens, a.stream);
  }
  if (error != cudaSuccess) return error;
  if (a.tokens <= 8) return several_tokens<BITS, SLOT, 1>(p, plan, a.stream);
  if constexpr (few_tokens(BITS, SLOT) > 8) {
    if (a.tokens <= few_tokens(BITS, SLOT)) return several_tokens<BITS, SLOT, 2>(p, plan, a.stream);
  }
  return many_tokens<BITS, SLOT>(p, a.stream);
}

// TYPE: that of x, if a program wants the kernels of no other.
template <int BITS, int TYPE = any_type>
cudaError_t launch_bits(const LutLinearArguments& a, int sm_count) {
  if (TYPE != any_type && static_cast<int>(a.x_type) != TYPE) return cudaErrorInvalidValue;
  switch (a.group_size) {
    case 32:
      return launch<BITS, 32, TYPE>(a, sm_count);
    case 64:
      return launch<BITS, 64, TYPE>(a, sm_count);
    case 128:
      return launch<BITS, 128, TYPE>(a, sm_count);
    default:
      return launch<BITS, 0, TYPE>(a, sm_count);
  }
}

}  // namespace integer

inline size_t lut_linear_integer_workspace_bytes(const LutLinearArguments& a, int sm_count) {
  return integer::workspace_of(a, sm_count).total();
}
// One word for every group of row tiles that may be summed over splits.
inline size_t lut_linear_integer_counter_bytes(const LutLinearArguments& a) {
  return static_cast<size_t>(integer::layout_of(a).row_tiles()) * sizeof(unsigned);
}

// As lut_linear (lut_linear.cuh), for act_bits 4 and 8.
inline cudaError_t lut_linear_integer(const LutLinearArguments& a, int sm_count) {
  const int g = a.rotation_group;
  const bool rotation_fits = g == 0 || ((g == 32 || g == 64 || g == 128) && a.columns % g == 0);
  // 128 * 128 * 131071 is the largest group sum that an int32 holds.
  const bool group_fits = a.group_size == 32 || a.group_size == 64 || a.group_size == 128 ||
                          (a.group_size == a.columns && a.columns <= 131071);
  if (a.tokens < 1) return a.tokens == 0 ? cudaSuccess : cudaErrorInvalidValue;
  if (a.rows < 1 || a.columns < 1 || a.columns > 0x1000000 || a.tokens > 0x7ffffff || a.rows > 0x7ffffff ||
      !rotation_fits || !group_fits || (a.act_bits != 4 && a.act_bits != 8)) {
    return cudaErrorInvalidValue;
  }
  switch (a.bits) {
    case 2:
      return integer::launch_bits<2>(a, sm_count);
    case 3:
      return integer::launch_bits<3>(a, sm_count);
    case 4:
      return integer::launch_bits<4>(a, sm_count);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rcp::cuda
