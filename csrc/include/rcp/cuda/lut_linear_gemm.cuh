// lut_linear for more than 16 tokens, act_bits 4 and 8: an int8 tensor-core GEMM. A block takes 8 row tiles, one a
// warp, and 32 tokens, whose B fragments all warps read from shared memory; each weight tile is expanded to signed
// bytes once for the 32 tokens. The fragments of the next sub-block are copied (cp.async; through registers on sm_75)
// while one is multiplied, and the next weights are on their way to registers.
#pragma once

#include "rcp/cuda/lut_linear_stream.cuh"

namespace rcp::cuda {

inline constexpr int gemm_warps = 8, gemm_token_tiles = 4;

struct GemmProblem {
  GemvProblem common;  // weight, bias, y, shapes, token_scales, fragments
  int token_tiles;
};

namespace gemm {

__device__ __forceinline__ void copy_16(uint4* to, const uint4* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  *to = *from;
#endif
}
__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_all() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

}  // namespace gemm

// Grid: x over groups of 4 token tiles, which meet the same weights in L2, y over groups of 8 row tiles.
template <int BITS, int SLOT>
__global__ void __launch_bounds__(32 * gemm_warps, 1) lut_linear_many_tokens(const GemmProblem parameters) {
  const GemmProblem problem = parameters;
  using PartType = fragments::Part<BITS, SLOT>;
  constexpr int NT = gemm_token_tiles, per_part = PartType::sub_blocks, parts = PartType::parts;
  constexpr int part_pieces = per_part * NT * 64;  // 16-byte pieces of fragments for a part
  extern __shared__ uint4 shared[];                // [2][part_pieces]: [sub-block][token tile][2][32]
  const GemvProblem& p = problem.common;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  const int tile = blockIdx.y * gemm_warps + warp, first_token_tile = blockIdx.x * NT;
  const bool present = tile < p.row_tiles;
  const int sub_blocks = (p.units - 1) * unit_sub_blocks + p.tail_sub_blocks;
  const int total_parts = (sub_blocks + per_part - 1) / per_part;
  const CudaLayout layout{0, 0, SLOT == 0 ? 512 : SLOT, BITS};
  const uint8_t* start = p.weight + (sizeof(WeightHeader) + static_cast<int64_t>(present ? tile : 0) * p.tile_bytes);

  PartType now, next;
  const auto load = [&](PartType& part, int index) {
    if (!present || index >= total_parts) return;
    const int unit = index / parts, n = unit == p.units - 1 ? p.tail_sub_blocks : unit_sub_blocks;
    const uint8_t* at = start + static_cast<int64_t>(unit) * PartType::unit_bytes;
    if (n == unit_sub_blocks) {
      part.template load<false>(at + lane * 16, at + lane / 4 * 16 + layout.table_area(unit_sub_blocks), index % parts,
                                n);
    } else {
      part.template load<true>(at + lane * 16, at + lane / 4 * 16 + layout.table_area(n), index % parts, n);
    }
  };
  const auto copy = [&](int index) {
    if (index < total_parts) {
      uint4* to = shared + index % 2 * part_pieces;
      for (int i = threadIdx.x; i < part_pieces; i += 32 * gemm_warps) {
        const int t = first_token_tile + i / 64 % NT, sub_block = index * per_part + i / (64 * NT);
        if (t < problem.token_tiles && sub_block < sub_blocks) {
          gemm::copy_16(to + i, p.fragments + (static_cast<int64_t>(t) * sub_blocks + sub_block) * 64 + i % 64);
        } else {
          to[i] = {0, 0, 0, 0};
        }
      }
    }
    gemm::commit();
  };
  fragments::Sums<SLOT, NT> sums;
  sums.clear();
  load(now, 0);
  const uint4 header = fragments::load_weight(p.weight);
  copy(0);
#pragma unroll 1
  for (int index = 0; index < total_parts; ++index) {
    load(next, index + 1);
    gemm::wait_for_all();
    __syncthreads();  // this part's fragments are there, and nobody reads the other buffer any more
    copy(index + 1);
    if (present) {
      const uint4* at = shared + index % 2 * part_pieces + lane;
      sums.template add<BITS>(now, [&](int b, uint32_t (&activation)[NT][8]) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const uint4 low = at[(b * NT + t) * 64], high = at[(b * NT + t) * 64 + 32];
          activation[t][0] = low.x, activation[t][1] = low.y, activation[t][2] = low.z, activation[t][3] = low.w;
          activation[t][4] = high.x, activation[t][5] = high.y, activation[t][6] = high.z, activation[t][7] = high.w;
        }
      });
    }
    now = next;
  }
  if (!present) return;
  const float tensor_scale = header_tensor_scale(header, p.stamp);
  const int64_t tokens = p.tokens;
#pragma unroll
  for (int t = 0; t < NT; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int64_t n = static_cast<int64_t>(tile) * tile_rows + row;
      const int64_t token = (static_cast<int64_t>(first_token_tile) + t) * 8 + lane % 4 * 2 + i % 2;
      if (n >= p.rows || token >= tokens) continue;
      float total = __int_as_float(sums.bits[t][i]);
      if constexpr (SLOT == 0) {
        total = __fmul_rn(stream::row_scale<BITS>(p, tile, row), static_cast<float>(sums.bits[t][i]));
      }
      const float bias = p.bias == nullptr ? 0.0f : activation::load_float(p.bias, p.bias_type, n);
      activation::store_float(p.y, p.y_type, token * p.rows + n,
                              __fmaf_rn(total, __fmul_rn(p.token_scales[token], tensor_scale), bias));
    }
  }
}

}  // namespace rcp::cuda
