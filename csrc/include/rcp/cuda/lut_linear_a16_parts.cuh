// What both kernels of lut_linear_a16.cuh are made of: units of weights into shared memory and from there into
// registers, the float16 mma, a token's loads, the fixed-order sum over blocks.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "rcp/cuda/activation_chunk.cuh"
#include "rcp/cuda/lut_linear_fragments.cuh"
#include "rcp/cuda/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp::cuda::a16 {

// 16 bytes of global memory into shared memory, past the L1 cache: every weight byte is read once.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global) : "memory");
#else
  *static_cast<uint4*>(to_shared) = __ldcg(static_cast<const uint4*>(from_global));
#endif
}

__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All copies but those of the last `PENDING` commits have arrived.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// c += a b, m16n8k16 of float16 with float32 sums. Turing: two m16n8k8. Separate operands for old and new c, as in
// fragments::multiply.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float d[4];
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  float half[4];
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(half[0]), "=f"(half[1]), "=f"(half[2]), "=f"(half[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1), "f"(half[0]), "f"(half[1]), "f"(half[2]), "f"(half[3]));
#endif
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = d[i];
}

// The place of a unit's areas and of what a lane reads from them, for SLOTS groups in a sub-block of 128 columns.
template <int BITS, int SLOTS>
struct UnitShape {
  static constexpr int levels = 1 << BITS, words = 2 * BITS;
  static constexpr int table_bytes = tile_rows * unit_sub_blocks * SLOTS * levels;
  static constexpr int scale_bytes = tile_rows * unit_sub_blocks * SLOTS * 2;
  static constexpr int steps = 4 / SLOTS;  // k-steps of 32 columns that share a group

  static __device__ __host__ constexpr int code_bytes(int n) { return 512 * ((BITS * n + 1) / 2); }
  static __device__ __host__ constexpr int bytes(int n) { return code_bytes(n) + table_bytes + scale_bytes; }

  // First column, within a sub-block, of the 8 that lanes 4 * gr + q own in a k-step.
  static __device__ __forceinline__ int column(int step, int q) {
    if (SLOTS == 4) return 32 * step + 8 * q;
    if (SLOTS == 2) return 64 * (step / 2) + 16 * q + 8 * (step % 2);
    return 32 * q + 8 * step;
  }

  // The code words of a sub-block. Three bits: 1.5 chunks of 16 bytes each; the half that an odd sub-block shares with
  // the one before stays in `words` 4 and 5 of the caller's array (8-byte loads would conflict in shared memory).
  static __device__ __forceinline__ void load_codes(const uint8_t* unit, int lane, int sub_block, uint32_t (&chunk)[12],
                                                    uint32_t (&code)[words]) {
    const auto load = [&](int index, int at) {
      const uint4 four = *reinterpret_cast<const uint4*>(unit + 512 * index + 16 * lane);
      chunk[at] = four.x, chunk[at + 1] = four.y, chunk[at + 2] = four.z, chunk[at + 3] = four.w;
    };
    int first = 0;
    if constexpr (BITS == 3) {
      if (sub_block % 2 == 0) {
        load(3 * (sub_block / 2), 0);
        load(3 * (sub_block / 2) + 1, 4);
      } else {
        load(3 * (sub_block / 2) + 2, 8);
        first = 6;
      }
    } else {
#pragma unroll
      for (int c = 0; c < BITS / 2; ++c) load(BITS / 2 * sub_block + c, 4 * c);
    }
#pragma unroll
    for (int w = 0; w < words; ++w) code[w] = chunk[first + w];
  }

  // Levels of a row in a slot.
  static __device__ __forceinline__ fragments::Table<BITS> load_table(const uint8_t* tables, int row, int slot) {
    const int at = slot * levels;
    const uint8_t* from = tables + at / 16 * 256 + row * 16 + at % 16;
    fragments::Table<BITS> table;
    if constexpr (BITS == 2) {
      table.levels[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (BITS == 3) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      table.levels[0] = two.x, table.levels[1] = two.y;
    } else {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      table.levels[0] = four.x, table.levels[1] = four.y, table.levels[2] = four.z, table.levels[3] = four.w;
    }
    return table;
  }

  // Scales of 4 slots: [row gr, row gr + 8][slot].
  static __device__ __forceinline__ void load_scales(const uint8_t* scales, int gr, int piece, float (&scale)[2][4]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(scales + 128 * piece + 16 * gr);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
      scale[i / 2][i % 2 * 2] = two.x, scale[i / 2][i % 2 * 2 + 1] = two.y;
    }
  }

  // Levels, a byte each and `offset` (bits to flip) in, of a sub-block: the A fragments of its four k-steps of 32
  // columns.
  static __device__ __forceinline__ void expand(const uint8_t* tables, int gr, int sub_block,
                                                const uint32_t (&code)[words], uint32_t offset, uint32_t (&a)[4][4]) {
    fragments::Table<BITS> slot_tables[SLOTS][2];
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        slot_tables[slot][r] = load_table(tables, gr + 8 * r, sub_block * SLOTS + slot);
#pragma unroll
        for (int i = 0; i < levels / 4; ++i) slot_tables[slot][r].levels[i] ^= offset;
      }
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t pair_code[BITS], pair_a[2][4];
      fragments::Table<BITS> pair_tables[2][2];
#pragma unroll
      for (int i = 0; i < BITS; ++i) pair_code[i] = code[pair * BITS + i];
#pragma unroll
      for (int i = 0; i < 4; ++i) pair_tables[i / 2][i % 2] = slot_tables[(2 * pair + i / 2) / steps][i % 2];
      fragments::expand<BITS>(pair_code, pair_tables, pair_a);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[2 * pair + i / 4][i % 4] = pair_a[i / 4][i % 4];
    }
  }
};

// A warp loads the 512 columns of a unit of one token, a lane 16 of them: two chunks c of 8, of sub-block lane / 8 and
// k-steps 2i + c with i = lane / 4 % 2, q = lane % 4.
template <class Shape>
__device__ __forceinline__ int64_t chunk_place(int64_t unit, int lane, int c) {
  return unit * unit_columns + lane / 8 * sub_block_columns + Shape::column(lane / 4 % 2 * 2 + c, lane % 4);
}

// Whether a unit of a token can be loaded 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool is_whole(const T* token, int64_t unit, int64_t columns) {
  return (unit + 1) * unit_columns <= columns && reinterpret_cast<uintptr_t>(token) % 16 == 0;
}

// Zeros past the last column.
template <class Shape, class T>
__device__ __forceinline__ void load_token(const T* token, int64_t unit, int64_t columns, int lane,
                                           float (&values)[2][8]) {
  if (is_whole(token, unit, columns)) {
#pragma unroll
    for (int c = 0; c < 2; ++c) load_whole_chunk(token + chunk_place<Shape>(unit, lane, c), values[c]);
  } else {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      load_partial_chunk(token, chunk_place<Shape>(unit, lane, c), columns, values[c]);
    }
  }
}

// The warp's largest magnitude, as float bits.
__device__ __forceinline__ uint32_t largest_of_warp(const float (&values)[2][8]) {
  return warp_max(largest_magnitude(values[1], largest_magnitude(values[0], 0)));
}

// Sums `values` over the blocks of grid.y, which share a cell (blockIdx.x), in the order of blockIdx.y. True for the
// one block of the cell, the last to arrive, that then holds the sums. counters return to zero by themselves.
template <int N>
__device__ __forceinline__ bool sum_splits(float (&values)[N], float* partials, uint32_t* counters) {
  const unsigned splits = gridDim.y;
  if (splits == 1) return true;
  __shared__ bool is_last;
  const auto place = [&](unsigned split, int i) {
    return partials + ((static_cast<int64_t>(blockIdx.x) * splits + split) * N + i) * blockDim.x + threadIdx.x;
  };
#pragma unroll
  for (int i = 0; i < N; ++i) __stcg(place(blockIdx.y, i), values[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(counters + blockIdx.x, splits - 1) == splits - 1;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.0f;
  for (unsigned split = 0; split < splits; ++split) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = __fadd_rn(values[i], __ldcg(place(split, i)));
  }
  return true;
}

__device__ __forceinline__ float load_value(const void* from, FloatType type, int64_t i) {
  if (type == FloatType::float32) return static_cast<const float*>(from)[i];
  if (type == FloatType::float16) return __half2float(static_cast<const __half*>(from)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
}

__device__ __forceinline__ void store_value(void* to, FloatType type, int64_t i, float value) {
  if (type == FloatType::float32) {
    static_cast<float*>(to)[i] = value;
  } else if (type == FloatType::float16) {
    static_cast<__half*>(to)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value);
  }
}

}  // namespace rcp::cuda::a16
