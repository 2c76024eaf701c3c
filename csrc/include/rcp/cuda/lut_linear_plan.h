// A call of lut_linear on CUDA, and the plan of its launches: which kernel, its grid, threads, shared memory and
// splits. Host code, plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "rcp/cuda/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp {
namespace cuda {

// y = lut_linear(x, weight) + bias, as docs/numerics.md. All pointers are device memory. Nothing is allocated,
// synchronised or kept, so a call can be captured into a graph.
struct LutLinearCall {
  const uint8_t* weight;  // blob of weight_layout.h, 16-byte aligned
  const void* x;          // [tokens, columns], contiguous, of x_type; any alignment of its element
  FloatType x_type;       // also the type of y
  const void* bias;       // [rows] of bias_type, or nullptr
  FloatType bias_type;
  void* y;  // [tokens, rows] of x_type
  int64_t tokens, rows, columns;
  int bits, group_size, act_bits;  // 2, 3, 4; 32, 64, 128 or columns; 4, 8, 16
  float clip;                      // multiplies the activations' maximum; act_bits 4 and 8 only
  // 0: none. 32, 64, 128: orthonormal Walsh transform of each run of that many columns, act_bits 4 and 8 only.
  int rotation_group;
  bool rotation_sequency;  // rows of the transform in sequency order, else in natural order
  void* workspace;         // LutLinearPlan::workspace_bytes(), 16-byte aligned, contents arbitrary
  // LutLinearPlan::counter_bytes, zeroed once by the caller. Every launch leaves zeros. Launches that may run at the
  // same time need different counters.
  unsigned* counters;
  cudaStream_t stream;
};

// Whether the call is within the contract above and the sizes that the kernels index.
inline bool is_supported(const LutLinearCall& call) {
  const int rotation = call.rotation_group;
  const bool integer = call.act_bits == 4 || call.act_bits == 8;
  const bool rotation_fits = rotation == 0 || (integer && call.columns % rotation == 0 &&
                                               (rotation == 32 || rotation == 64 || rotation == 128));
  // 128 * 128 * 131071 is the largest group sum that an int32 holds.
  const bool group_fits = call.group_size == 32 || call.group_size == 64 || call.group_size == 128 ||
                          (call.group_size == call.columns && (!integer || call.columns <= 131071));
  return (integer || call.act_bits == 16) && call.bits >= 2 && call.bits <= 4 && rotation_fits && group_fits &&
         call.rows >= 1 && call.rows <= 0x7ffffff && call.columns >= 1 && call.columns <= 0x1000000 &&
         call.tokens >= 1 && call.tokens <= 0x7ffffff;
}

// The kernels that multiply.
enum class LutLinearKernel { one_token, few_tokens, many_tokens, fixed_point, half };

struct LutLinearPlan {
  LutLinearKernel kernel;
  int row_tiles, token_tiles;  // of an output block
  int splits, units_per_split;
  int units_per_stage;  // fixed_point and half only
  int64_t grid_x, grid_y;
  int threads;
  size_t shared_bytes;  // dynamic
  // Areas of the workspace, in this order: token scales, fragments, sums of the splits.
  size_t scale_bytes, fragment_bytes, sum_bytes;
  size_t counter_bytes;
  bool early_launch;  // the launches may begin before the previous one in the stream has ended (ptx.cuh)

  size_t workspace_bytes() const { return scale_bytes + fragment_bytes + sum_bytes; }
};

inline constexpr int gemv_warps = 8, gemm_warps = 8, gemm_token_tiles = 4;
// Bytes of x that a token takes in a unit of a stage.
inline constexpr int fixed_point_token_bytes = 2048, half_token_bytes = 1024;

// Sub-blocks of a part. A part is a whole unit where two of them fit into registers, so that a warp multiplies one
// while the next is on its way. It is half or a quarter of a unit where groups are small and tables are large.
RCP_HOST_DEVICE constexpr int part_sub_blocks(int bits, int group_size) {
  return bits == 4 && group_size == 32 ? 1 : group_size == 32 || (group_size == 64 && bits > 2) ? 2 : 4;
}

// The row tiles of a block of the kernel for one token: one output for each thread.
inline constexpr int one_token_most_row_tiles = 16;
// Its blocks on a multiprocessor. Wider codes and smaller groups have tables that need the registers of two blocks.
constexpr int one_token_blocks(int bits, int group_size) {
  return bits == 2 && group_size != 32 && group_size != 64 ? 2 : 1;
}
// The row tiles of a block of the kernel for 2 to 16 tokens: few or many. A block reads 32 KB of activations for 8
// tokens and 4096 columns, so as many rows share them as registers allow. Groups other than 128 have one size, to keep
// the kernels few.
inline constexpr int few_tokens_row_tiles = 2;
constexpr int few_tokens_most_row_tiles(int bits, int group_size) {
  return group_size != 128 ? few_tokens_row_tiles : bits == 2 ? 6 : 4;
}
// The most tokens of the GEMV kernels: with large tables, registers hold no second token tile.
constexpr int gemv_most_tokens(int bits, int group_size) {
  return bits == 4 || (bits == 3 && group_size == 32) ? 8 : 16;
}

// Whether the device code that a GPU of that compute capability runs waits for the previous launch (ptx.cuh). Code for
// sm_80 does not, and runs on newer GPUs where no newer code was compiled.
constexpr bool compiled_for_early_launch([[maybe_unused]] int compute_capability) {
#ifdef __CUDA_ARCH_LIST__
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch >= 900 && arch / 100 == compute_capability / 10 && arch / 10 <= compute_capability) return true;
  }
#endif
  return false;
}

namespace plan_detail {

constexpr int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr size_t aligned(int64_t bytes) {
  return static_cast<size_t>(ceil_divide(bytes, 256) * 256);
}

constexpr int gemv_shared_limit = 48 * 1024 - 288;  // the kernels' static shared memory is less than 288 bytes

// The plan of the GEMV kernels for a choice of row tiles and units of a block.
inline LutLinearPlan gemv_plan(const CudaLayout& layout, LutLinearKernel kernel, int token_tiles, int row_tiles,
                               int64_t units_per_split) {
  LutLinearPlan plan{};
  plan.kernel = kernel;
  plan.row_tiles = row_tiles, plan.token_tiles = token_tiles;
  plan.units_per_split = static_cast<int>(units_per_split);
  plan.splits = static_cast<int>(ceil_divide(layout.units(), units_per_split));
  plan.grid_x = ceil_divide(layout.row_tiles(), row_tiles);
  plan.grid_y = plan.splits;
  plan.threads = 32 * gemv_warps;
  const bool one_token = kernel == LutLinearKernel::one_token;
  plan.shared_bytes = static_cast<size_t>(gemv_warps * row_tiles) * (one_token ? 256 : 512 * token_tiles) +
                      static_cast<size_t>(one_token ? units_per_split * unit_columns : 0);
  const int64_t outputs = one_token ? tile_rows : 128 * token_tiles;
  if (plan.splits > 1) plan.sum_bytes = aligned(plan.splits * layout.row_tiles() * outputs * 4);
  return plan;
}

// Calls f(units_per_split) for each number of splits that leaves none empty: up to 64, or as many as shared memory
// needs for a split of one token.
template <class F>
void visit_splits(const CudaLayout& layout, const F& f) {
  const int64_t units = layout.units(), most = std::max<int64_t>(64, ceil_divide(units, 64));
  for (int64_t splits = 1; splits <= std::min(units, most); ++splits) {
    const int64_t per_split = ceil_divide(units, splits);
    if (ceil_divide(units, per_split) == splits) f(per_split);
  }
}

// Cycles that a sum over splits takes: a fence, an atomic, a fence and the sums of the other blocks, each a round trip
// to L2 or memory after the last. In a simulation splits cost far more than one round trip.
constexpr double split_cycles = 4000.0;
// Bytes of weights a cycle and multiprocessor: between an RTX 3090's 7 and an A100's 13. And of L2.
constexpr double memory_bytes = 12.0, l2_bytes = 36.0;
// Instructions count 1.5 times, since most go to the integer pipe, which takes one of a warp every other cycle. A
// multiprocessor issues those of four warps.
constexpr double block_cycles(double instructions_a_warp) {
  return gemv_warps / 4 * 1.5 * instructions_a_warp;
}

// One token: the row tiles and units of a block. Model, not measured; in cycles of a multiprocessor.
//
//   cost = waves * 1500 + memory + blocks of the busiest multiprocessor * block_cycles(150 + quantizing + 190 * steps)
//
// 1500 cycles are a wave's chain of latencies before its first product: the token's load, maximum and rounding. The
// work of the busiest multiprocessor is added to the time of memory, not hidden behind it: a simulation showed this
// where some multiprocessors had no block. The model spreads the row tiles evenly, and avoids a second wave. It does
// not give every multiprocessor a block where that costs the busiest one a second block: 128 row tiles are 64 blocks of
// two on 108 multiprocessors. Of equal costs, the one with fewer blocks.
inline LutLinearPlan plan_one_token(const LutLinearCall& call, const CudaLayout& layout, int sm_count) {
  LutLinearPlan best{};
  double best_cost = 1e300;
  visit_splits(layout, [&](int64_t per_split) {
    for (int row_tiles = one_token_most_row_tiles; row_tiles >= 1; --row_tiles) {
      const LutLinearPlan plan = gemv_plan(layout, LutLinearKernel::one_token, 1, row_tiles, per_split);
      if (plan.shared_bytes > gemv_shared_limit) continue;
      const int64_t blocks = plan.grid_x * plan.grid_y, on_busiest = ceil_divide(blocks, sm_count);
      const int64_t waves = ceil_divide(on_busiest, one_token_blocks(call.bits, call.group_size));
      const double token = static_cast<double>(layout.units() * unit_columns);
      const double memory = (static_cast<double>(layout.total_bytes()) / memory_bytes +
                             static_cast<double>(blocks) * token * 4 / l2_bytes) /
                            sm_count;
      const double quantize = (token * 1.4 + static_cast<double>(per_split) * unit_columns * 4.5) / (32 * gemv_warps);
      const double steps = static_cast<double>(ceil_divide(per_split, gemv_warps) * row_tiles);
      const double issue = static_cast<double>(on_busiest) * block_cycles(150 + quantize + 190 * steps);
      const double cost = static_cast<double>(waves) * 1500 + memory + issue + (plan.splits > 1 ? split_cycles : 0);
      if (cost < best_cost) best = plan, best_cost = cost;
    }
  });
  return best;
}

// 2 to 16 tokens. Model, not measured; in cycles of a multiprocessor.
//
//   cost = max(memory, blocks of the busiest multiprocessor * block_cycles(240 + 184 * row tiles * a warp's units))
//
// memory also has the activations that every block reads again, from L2. Instructions are those of the compiled kernel
// (W2, sm_80). Of equal costs, the one with fewer instructions.
inline LutLinearPlan plan_few_tokens(const LutLinearCall& call, const CudaLayout& layout, int token_tiles,
                                     int sm_count) {
  LutLinearPlan best{};
  double best_cost = 1e300, best_instructions = 1e300;
  const int most = token_tiles == 2 ? few_tokens_row_tiles : few_tokens_most_row_tiles(call.bits, call.group_size);
  for (const int row_tiles : {few_tokens_row_tiles, most}) {
    visit_splits(layout, [&](int64_t per_split) {
      const LutLinearPlan plan = gemv_plan(layout, LutLinearKernel::few_tokens, token_tiles, row_tiles, per_split);
      if (plan.shared_bytes > gemv_shared_limit) return;
      const int64_t blocks = plan.grid_x * plan.grid_y;
      const double a_warp = 240 + static_cast<double>(ceil_divide(per_split, gemv_warps)) * row_tiles * 184.0;
      const double issue = static_cast<double>(ceil_divide(blocks, sm_count)) * block_cycles(a_warp);
      const double activations = static_cast<double>(blocks * per_split) * token_tiles * 8 * unit_columns;
      const double memory =
          (static_cast<double>(layout.total_bytes()) / memory_bytes + activations / l2_bytes) / sm_count;
      const double cost = std::max(issue, memory) + (plan.splits > 1 ? split_cycles : 0.0);
      const double instructions = static_cast<double>(blocks) * a_warp;
      if (cost < best_cost || (cost == best_cost && instructions < best_instructions)) {
        best = plan, best_cost = cost, best_instructions = instructions;
      }
    });
  }
  return best;
}

// act_bits 4 and 8.
//
//   1 token         one launch that quantizes the token itself. With a rotation it takes the launches of few tokens:
//                   every block would have to rotate the whole token to know its maximum, at least 14 % of a 4096 x
//                   4096 layer's instructions (7 additions a value, 64 blocks), where one small launch before takes 0.5
//                   %
//   2 to 16 tokens  one small launch that rotates and quantizes, then the GEMV kernel
//   more tokens     the same small launch, then the GEMM kernel
inline LutLinearPlan plan_integer(const LutLinearCall& call, const CudaLayout& layout, int sm_count,
                                  int compute_capability) {
  LutLinearPlan plan{};
  const int64_t token_tiles = ceil_divide(call.tokens, 8);
  if (call.tokens > gemv_most_tokens(call.bits, call.group_size)) {
    plan.kernel = LutLinearKernel::many_tokens;
    plan.row_tiles = gemm_warps, plan.token_tiles = gemm_token_tiles;
    plan.splits = 1, plan.units_per_split = static_cast<int>(layout.units());
    plan.grid_x = ceil_divide(token_tiles, gemm_token_tiles);
    plan.grid_y = ceil_divide(layout.row_tiles(), gemm_warps);
    plan.threads = 32 * gemm_warps;
    plan.shared_bytes = 2 * part_sub_blocks(call.bits, call.group_size) * gemm_token_tiles * 1024;
  } else if (call.tokens == 1 && call.rotation_group == 0) {
    plan = plan_one_token(call, layout, sm_count);
  } else {
    plan = plan_few_tokens(call, layout, static_cast<int>(token_tiles), sm_count);
  }
  if (plan.kernel != LutLinearKernel::one_token) {
    plan.scale_bytes = aligned(token_tiles * 8 * 4);
    plan.fragment_bytes = static_cast<size_t>(token_tiles * layout.sub_blocks() * 1024);
  }
  plan.early_launch = compiled_for_early_launch(compute_capability);
  return plan;
}

// act_bits 16.
inline LutLinearPlan plan_a16(const LutLinearCall& call, const CudaLayout& layout, int sm_count,
                              int compute_capability) {
  LutLinearPlan plan{};
  const bool fixed = call.tokens <= 4 || call.x_type == FloatType::float32;
  plan.kernel = fixed ? LutLinearKernel::fixed_point : LutLinearKernel::half;
  plan.token_tiles = fixed ? (call.tokens <= 2 ? 1 : 2) : call.tokens <= 8 ? 1 : call.tokens <= 16 ? 2 : 4;
  // The digits of two tokens fill a tile of the fixed-point kernel.
  const int tokens = (fixed ? 2 : 8) * plan.token_tiles;
  // A stage is 16 KB of x, and at least one unit: 4 units of 1 or 2 tokens, 2 units of 4 or 8.
  const int unit_x_bytes = tokens * (fixed ? fixed_point_token_bytes : half_token_bytes);
  plan.units_per_stage = std::max(16384 / unit_x_bytes, 1);
  const size_t x_bytes = static_cast<size_t>(plan.units_per_stage) * (unit_x_bytes + 4 * tokens);
  // A block's shared memory: 64 KB on sm_75; 99 KB on sm_86, 89 and 120. More would only cost occupancy elsewhere. 128
  // bytes are left for static shared memory.
  const size_t limit = (compute_capability < 80 ? 65536 : 101376) - 128;
  const size_t warp_bytes = 2 * static_cast<size_t>(layout.unit_bytes());
  int warps = 8;
  while (warps > 1 && warps * warp_bytes + x_bytes > limit) warps /= 2;
  plan.row_tiles = warps;
  plan.threads = 32 * warps;
  plan.shared_bytes = warps * warp_bytes + x_bytes;
  plan.grid_x = ceil_divide(call.tokens, tokens) * ceil_divide(layout.row_tiles(), warps);
  // The split with the least work for the busiest multiprocessor; a block's fixed cost is that of 0.7 units.
  const int64_t units = layout.units();
  double best = 0;
  for (int64_t per_split = 1; per_split <= units; ++per_split) {
    const int64_t splits = ceil_divide(units, per_split);
    if (splits > 65535) continue;
    const double cost =
        static_cast<double>(ceil_divide(plan.grid_x * splits, sm_count)) * (static_cast<double>(per_split) + 0.7);
    if (plan.splits == 0 || cost < best) {
      best = cost;
      plan.splits = static_cast<int>(splits);
      plan.units_per_split = static_cast<int>(per_split);
    }
  }
  plan.grid_y = plan.splits;
  const int lane_sums = (fixed ? 1 : 4) * plan.token_tiles;
  if (plan.splits > 1) plan.sum_bytes = static_cast<size_t>(plan.grid_x * plan.splits * lane_sums * plan.threads * 4);
  return plan;
}

}  // namespace plan_detail

// The plan for a GPU with that many multiprocessors; compute_capability is 10 * major + minor.
inline LutLinearPlan plan_lut_linear(const LutLinearCall& call, int sm_count, int compute_capability) {
  const CudaLayout layout{call.rows, call.columns, call.group_size, call.bits};
  LutLinearPlan plan = call.act_bits == 16 ? plan_detail::plan_a16(call, layout, sm_count, compute_capability)
                                           : plan_detail::plan_integer(call, layout, sm_count, compute_capability);
  if (plan.splits > 1) plan.counter_bytes = static_cast<size_t>(plan.grid_x) * sizeof(unsigned);
  return plan;
}

// The parameters of every kernel of lut_linear: the call, and numbers that follow from its shape and its plan.
struct LutLinearParameters {
  LutLinearCall call;
  uint32_t shape_hash;
  int tile_bytes, row_tiles, units, tail_sub_blocks;  // sub-blocks of the last unit of a row
  int splits, units_per_split, units_per_stage;
  int block_tiles;   // row tiles of a block
  int row_blocks;    // blocks that cover the rows
  int whole_blocks;  // the first of these, which miss no row tile and no sub-block
  float qmax, qmax_inverse;
  float* token_scales;  // [tokens]
  uint8_t* fragments;   // [token tile][sub-block][2][32 lanes][16 bytes]
  int* split_sums;      // int or float
};

inline LutLinearParameters lut_linear_parameters(const LutLinearCall& call, const LutLinearPlan& plan) {
  const CudaLayout layout{call.rows, call.columns, call.group_size, call.bits};
  LutLinearParameters p{};
  p.call = call;
  p.shape_hash = layout.shape_hash();
  p.tile_bytes = static_cast<int>(layout.tile_bytes());
  p.row_tiles = static_cast<int>(layout.row_tiles());
  p.units = static_cast<int>(layout.units());
  p.tail_sub_blocks = layout.sub_blocks_of(layout.units() - 1);
  p.splits = plan.splits;
  p.units_per_split = plan.units_per_split;
  p.units_per_stage = plan.units_per_stage;
  p.block_tiles = plan.row_tiles;
  p.row_blocks = (p.row_tiles + plan.row_tiles - 1) / plan.row_tiles;
  p.whole_blocks = p.tail_sub_blocks == unit_sub_blocks ? p.row_tiles / plan.row_tiles : 0;
  p.qmax = call.act_bits == 4 ? 7.0f : 127.0f;
  p.qmax_inverse = 1.0f / p.qmax;
  auto* workspace = static_cast<uint8_t*>(call.workspace);
  p.token_scales = reinterpret_cast<float*>(workspace);
  p.fragments = workspace + plan.scale_bytes;
  p.split_sums = reinterpret_cast<int*>(workspace + plan.scale_bytes + plan.fragment_bytes);
  return p;
}

// Enqueues a kernel. early_launch: it calls wait_for_previous_launch, and may begin before the previous one has ended.
inline cudaError_t launch(void (*kernel)(LutLinearParameters), LutLinearParameters parameters, dim3 grid, int threads,
                          size_t shared_bytes, bool early_launch) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const dim3 block(static_cast<unsigned>(threads));
  void* arguments[] = {&parameters};
  if (early_launch) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = grid, configuration.blockDim = block;
    configuration.dynamicSmemBytes = shared_bytes, configuration.stream = parameters.call.stream;
    configuration.attrs = &attribute, configuration.numAttrs = 1;
    cudaLaunchKernelExC(&configuration, function, arguments);
  } else {
    cudaLaunchKernel(function, grid, block, arguments, shared_bytes, parameters.call.stream);
  }
  return cudaGetLastError();
}

// The same with the plan's grid, threads and shared memory.
inline cudaError_t launch(void (*kernel)(LutLinearParameters), const LutLinearParameters& parameters,
                          const LutLinearPlan& plan, bool early_launch) {
  if (plan.grid_x > 0x7fffffff || plan.grid_y > 65535) return cudaErrorInvalidValue;
  if (plan.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  return launch(kernel, parameters, grid, plan.threads, plan.shared_bytes, early_launch);
}

}  // namespace cuda
}  // namespace rcp
