// lut_linear for more than 16 tokens, act_bits 4 and 8: an int8 tensor-core GEMM. A block takes 8 row tiles, one for
// each warp, and 32 tokens, whose B fragments all warps read from shared memory. A weight is expanded to signed bytes
// once for the 32 tokens. While one part is multiplied, the fragments of the next are copied to shared memory
// (cp.async; through registers on sm_75) and its weights to registers.
#pragma once

#include "rcp/cuda/lut_linear_finish.cuh"
#include "rcp/cuda/lut_linear_fragments.cuh"

namespace rcp::cuda {

// Starts the copy of the B fragments of a part, whose first sub-block is given, to shared memory
// [sub-block][token tile][2][32 lanes]. Those that do not exist become zeros.
template <int SUB_BLOCKS>
__device__ __forceinline__ void copy_fragments(const LutLinearParameters& p, uint4* to, int first_token_tile,
                                               int first_sub_block, int sub_blocks) {
  const int token_tiles = static_cast<int>((p.call.tokens + 7) / 8);
  for (int i = threadIdx.x; i < SUB_BLOCKS * gemm_token_tiles * 64; i += 32 * gemm_warps) {
    const int t = first_token_tile + i / 64 % gemm_token_tiles,
              sub_block = first_sub_block + i / (64 * gemm_token_tiles);
    if (t < token_tiles && sub_block < sub_blocks) {
      ptx::copy_async(to + i, p.fragments + (static_cast<int64_t>(t) * sub_blocks + sub_block) * 1024 + i % 64 * 16);
    } else {
      to[i] = {0, 0, 0, 0};
    }
  }
}

// Grid: x over groups of 4 token tiles, y over groups of 8 row tiles. Blocks with neighbouring x read the same weights,
// which are then in L2.
template <int BITS, int GROUP>
__global__ void __launch_bounds__(32 * gemm_warps, 1) lut_linear_many_tokens(const LutLinearParameters parameters) {
  const LutLinearParameters p = parameters;
  using PartType = fragments::Part<BITS, GROUP>;
  constexpr int tiles = gemm_token_tiles, per_part = PartType::sub_blocks, parts = PartType::parts;
  constexpr int part_vectors = per_part * tiles * 64;  // of fragments
  extern __shared__ uint4 shared[];                    // [2][part_vectors]: [sub-block][token tile][2][32]
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  const int tile = blockIdx.y * gemm_warps + warp, first_token_tile = blockIdx.x * tiles;
  const bool present = tile < p.row_tiles;
  const int sub_blocks = (p.units - 1) * unit_sub_blocks + p.tail_sub_blocks;
  const int total_parts = (sub_blocks + per_part - 1) / per_part;
  const uint8_t* start =
      p.call.weight + (sizeof(WeightHeader) + static_cast<int64_t>(present ? tile : 0) * p.tile_bytes);

  PartType now, next;
  const auto load = [&](PartType& part, int index) {
    if (!present || index >= total_parts) return;
    const int unit = index / parts, n = unit == p.units - 1 ? p.tail_sub_blocks : unit_sub_blocks;
    const uint8_t* codes = start + static_cast<int64_t>(unit) * PartType::unit_bytes + lane * 16;
    const uint8_t* tables = codes - lane * 16 + lane / 4 * 16;
    if (n == unit_sub_blocks) {
      part.template load<false>(codes, tables + unit_layout<BITS, GROUP>().table_area(unit_sub_blocks), index % parts,
                                n);
    } else {
      part.template load<true>(codes, tables + unit_layout<BITS, GROUP>().table_area(n), index % parts, n);
    }
  };
  const auto copy = [&](int index) {
    if (index < total_parts) {
      copy_fragments<per_part>(p, shared + index % 2 * part_vectors, first_token_tile, index * per_part, sub_blocks);
    }
    ptx::copy_commit();
  };
  fragments::Sums<GROUP, tiles> sums;
  sums.clear();
  load(now, 0);
  const uint4 header = ptx::load_vector(p.call.weight);
  copy(0);
#pragma unroll 1
  for (int index = 0; index < total_parts; ++index) {
    load(next, index + 1);
    ptx::copy_wait<0>();
    __syncthreads();  // this part's fragments have arrived, and no warp reads the other buffer any more
    copy(index + 1);
    if (present) {
      const uint4* at = shared + index % 2 * part_vectors + lane;
      sums.template add<BITS>(now, [&](int b, uint32_t (&activation)[tiles][8]) {
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
          fragments::unpack(at[(b * tiles + t) * 64], at[(b * tiles + t) * 64 + 32], activation[t]);
        }
      });
    }
    now = next;
  }
  if (!present) return;
  const float tensor_scale = header_tensor_scale(header, p.shape_hash);
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = (static_cast<int64_t>(first_token_tile) + t) * 8 + lane % 4 * 2 + i % 2;
      store_output<BITS, GROUP>(p, tile, lane / 4 + i / 2 * 8, token, sums.bits[t][i], tensor_scale);
    }
  }
}

}  // namespace rcp::cuda
