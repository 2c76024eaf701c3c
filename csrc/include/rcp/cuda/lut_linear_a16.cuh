// lut_linear with act_bits 16 for CUDA: x is not quantized. Weights stream from the blob of lut_linear_cuda_layout.h,
// the same for all act_bits. Two kernels:
//
// fixed_point_kernel, up to 4 tokens (float32 x: any number): x becomes four signed base-256 digits of a 31-bit fixed
//   point, one exponent per token and 512 columns, and the digits of two tokens are the eight columns of an int8 mma.
//   So the sum of a group is exact, decoding costs what it costs with act_bits 8 (levels never become float16: that
//   alone is one more instruction a weight), and an mma does 16 x 32 weights where float16's does 16 x 16. float16 and
//   bfloat16 x within 2^-19 and 2^-22 of the largest |x| of their 512 columns enter exactly.
//
// half_kernel, 5 tokens or more of float16 or bfloat16: levels become float16, and m16n8k16 sums in float32. A tile of
//   weights is expanded once for 8, 16 or 32 tokens. bfloat16 x is brought into float16's range by a power of two per
//   token and 512 columns (so sm_75 needs no bfloat16 mma): exact for values within 2^-31 of the largest one.
//
// Both: a warp owns 16 rows and copies its weights by cp.async, 16 bytes a lane, two units of 512 columns ahead, the
// first two before x is looked at; a block's warps share x. Issued SASS instructions per weight at 4096 x 4096, G =
// 128, sm_86, prologue and epilogue included (counted, 84 multiprocessors): one token 1.63, 1.78 and 2.50 for 2, 3 and
// 4 bits; 8 tokens 3.2, 3.3 and 4.1.
//
// Numerics. Inside a group as above; then, g ascending inside a unit of 512 columns, units ascending inside a block's
// range of columns, and block ranges ascending:
//
//   part = fma(scale[n, g], I[m, n, g], part);  acc = fma(part, 2^e[m, unit], acc);  y = fma(acc, tensor_scale,
//   bias[n])
//
// A group of more than 128 columns counts as groups of 128. The order depends on the shape, on the number of
// multiprocessors and on which kernel runs, never on timing: two runs agree bit for bit. With
// S = ceil(K / min(G, 128)) + 2 ceil(K / 512) + 3 roundings outside the groups, y before the cast is within
//
//   fixed_point   3 S 2^-24 sum |x * weight| + 2^-30 (sum over units of max|x| sum |weight|)        3: signed digits
//   half          (S + G / 16) 2^-23 sum |x * weight|, if an mma of 16 products rounds to 2^-23, as the truncation of
//                 tensor cores does; with bfloat16 x also 2^-38 (sum over units of max|x| sum |weight|)
//
// of the exact result, plus 2^-24 |bias|. NaN and Inf in x spread to all outputs of their token as NaN, in half_kernel
// with float16 x as in any linear layer. A blob with another magic, version or shape gives NaN.
#pragma once

#include "rcp/cuda/lut_linear_a16_fixed_point.cuh"
#include "rcp/cuda/lut_linear_a16_half.cuh"

namespace rcp::cuda {
namespace a16 {

// How a call is cut into blocks.
struct Plan {
  bool fixed;
  int tiles, warps, token_block, units_per_stage, units_per_split, splits, row_blocks;
  int64_t cells;
  size_t shared_bytes, workspace_bytes;
};

inline Plan make_plan(const LutLinearArguments& a, int sm_count, int compute_capability) {
  const CudaLayout layout{a.rows, a.columns, a.group_size, a.bits};
  Plan plan{};
  plan.fixed = a.tokens <= 4 || a.x_type == FloatType::float32;
  plan.tiles = plan.fixed ? (a.tokens <= 2 ? 1 : 2) : a.tokens <= 8 ? 1 : a.tokens <= 16 ? 2 : 4;
  plan.token_block = (plan.fixed ? 2 : 8) * plan.tiles;
  // Of x 16 KB, and one unit at least: 4 units of 1 or 2 tokens, 2 of 4 or 8.
  const int stage_bytes = plan.token_block * (plan.fixed ? fixed_token_bytes : half_token_bytes);
  plan.units_per_stage = stage_bytes < 16384 ? 16384 / stage_bytes : 1;
  const size_t x_bytes = static_cast<size_t>(plan.units_per_stage) * (stage_bytes + 4 * plan.token_block);
  // A block's shared memory: 64 KB on sm_75, 99 KB on sm_86, 89 and 120, less what sum_splits has; more elsewhere would
  // only cost occupancy.
  const size_t limit = (compute_capability < 80 ? 65536 : 101376) - 128;
  plan.warps = 8;
  while (plan.warps > 1 && plan.warps * 2 * static_cast<size_t>(layout.unit_bytes()) + x_bytes > limit) plan.warps /= 2;
  plan.shared_bytes = plan.warps * 2 * static_cast<size_t>(layout.unit_bytes()) + x_bytes;
  plan.row_blocks = static_cast<int>((layout.row_tiles() + plan.warps - 1) / plan.warps);
  plan.cells = (a.tokens + plan.token_block - 1) / plan.token_block * plan.row_blocks;
  // The split with the least work for the busiest multiprocessor; a block's fixed cost is that of 0.7 units.
  const int64_t units = layout.units();
  double best = 0;
  for (int64_t per_split = 1; per_split <= units; ++per_split) {
    const int64_t splits = (units + per_split - 1) / per_split;
    if (splits > 65535) continue;
    const int64_t blocks_per_sm = (plan.cells * splits + sm_count - 1) / sm_count;
    const double cost = static_cast<double>(blocks_per_sm) * (static_cast<double>(per_split) + 0.7);
    if (plan.splits == 0 || cost < best) {
      best = cost;
      plan.splits = static_cast<int>(splits);
      plan.units_per_split = static_cast<int>(per_split);
    }
  }
  const int values = (plan.fixed ? 1 : 4) * plan.tiles;
  if (plan.splits > 1) plan.workspace_bytes = static_cast<size_t>(plan.cells) * plan.splits * values * plan.warps * 128;
  return plan;
}

using Kernel = void (*)(KernelArguments);

template <int BITS, int SLOTS>
Kernel choose_kernel(const Plan& plan) {
  if (plan.fixed) return plan.tiles == 1 ? fixed_point_kernel<BITS, SLOTS, 1> : fixed_point_kernel<BITS, SLOTS, 2>;
  return plan.tiles == 1   ? half_kernel<BITS, SLOTS, 1>
         : plan.tiles == 2 ? half_kernel<BITS, SLOTS, 2>
                           : half_kernel<BITS, SLOTS, 4>;
}

template <int BITS>
Kernel choose_kernel(const Plan& plan, int64_t group_size) {
  return group_size == 32   ? choose_kernel<BITS, 4>(plan)
         : group_size == 64 ? choose_kernel<BITS, 2>(plan)
                            : choose_kernel<BITS, 1>(plan);
}

}  // namespace a16

inline size_t lut_linear_a16_workspace_bytes(const LutLinearArguments& a, int sm_count) {
  if (a.tokens < 1) return 0;
  // The plans of small and of large shared memory.
  const size_t small = a16::make_plan(a, sm_count, 75).workspace_bytes;
  const size_t large = a16::make_plan(a, sm_count, 80).workspace_bytes;
  return small > large ? small : large;
}

inline size_t lut_linear_a16_counter_bytes(const LutLinearArguments& a, int sm_count) {
  if (a.tokens < 1) return 0;
  size_t bytes = 0;
  for (int compute_capability : {75, 80}) {
    const a16::Plan plan = a16::make_plan(a, sm_count, compute_capability);
    const size_t needed = plan.splits > 1 ? static_cast<size_t>(plan.cells) * sizeof(uint32_t) : 0;
    if (needed > bytes) bytes = needed;
  }
  return bytes;
}

// act_bits 16; BITS is a.bits, a template argument so that each can be compiled by itself. rotation_group must be 0:
// transform x before.
template <int BITS>
cudaError_t lut_linear_a16(const LutLinearArguments& a, int sm_count, int compute_capability) {
  if (a.act_bits != 16 || a.rotation_group != 0 || a.bits != BITS) return cudaErrorInvalidValue;
  if (a.group_size != 32 && a.group_size != 64 && a.group_size != 128 && a.group_size != a.columns) {
    return cudaErrorInvalidValue;
  }
  if (a.tokens < 1 || a.rows < 1) return cudaSuccess;
  const CudaLayout layout{a.rows, a.columns, a.group_size, a.bits};
  const a16::Plan plan = a16::make_plan(a, sm_count, compute_capability);
  if (plan.cells > 0x7fffffff || layout.units() > 0x3fffffff) return cudaErrorInvalidValue;
  const a16::Kernel kernel = a16::choose_kernel<BITS>(plan, a.group_size);
  if (plan.shared_bytes > 49152) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const a16::KernelArguments arguments{a,
                                       layout.tile_bytes(),
                                       plan.row_blocks,
                                       static_cast<int>(layout.units()),
                                       plan.units_per_split,
                                       plan.units_per_stage,
                                       layout.sub_blocks_of(layout.units() - 1)};
  const dim3 grid(static_cast<unsigned>(plan.cells), static_cast<unsigned>(plan.splits));
  kernel<<<grid, plan.warps * 32, plan.shared_bytes, a.stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace rcp::cuda
