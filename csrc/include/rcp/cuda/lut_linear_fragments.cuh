// From packed codes to integer tensor-core products: the loads, table look-ups and mma that the integer kernels of
// lut_linear share. Order of the bytes: lut_linear_cuda_layout.h.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda::fragments {

// 12582912 = 1.5 * 2^23. An accumulator that starts from its bit pattern holds, after adding an integer |I| < 2^22, the
// bits of the float 12582912 + I: one subtraction converts it, where I2F runs at a quarter of the rate. The largest sum
// of a group of 128 is 128 * 128 * 128 = 2^21. It also rounds: x + 12582912 has rint(x) in its low bits, ties to even.
inline constexpr float magic = 12582912.0f;
inline constexpr int magic_bits = 0x4b400000;

// Inline assembly, because the compiler splits a plain `word & 0x33333333` that feeds prmt into one AND per 16 bits,
// and
// __byte_perm masks its selector, which the hardware ignores beyond 16 bits anyway: 2.2 instructions a weight instead
// of 0.9.
__device__ __forceinline__ uint32_t bit_and(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("and.b32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <int SHIFT>
__device__ __forceinline__ uint32_t shift_right(uint32_t a) {
  uint32_t d;
  asm("shr.u32 %0, %1, %2;" : "=r"(d) : "r"(a), "n"(SHIFT));
  return d;
}
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
}

__device__ __forceinline__ uint4 load_weight(const uint8_t* at) {
  return __ldg(reinterpret_cast<const uint4*>(at));
}

// d = A B + c, A 16 x 32 and B 32 x 8 signed bytes, c and d 16 x 8. Lane l = 4 * gr + q holds rows gr, gr + 8 and
// columns 2q, 2q + 1 of c. On sm_75 the same fragments are four m8n8k16. c and d are separate operands: tied ones would
// have to be filled with the start value first.
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int half[2];
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(half[0]), "=r"(half[1])
        : "r"(a[r]), "r"(b0), "r"(c[2 * r]), "r"(c[2 * r + 1]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(d[2 * r]), "=r"(d[2 * r + 1])
        : "r"(a[2 + r]), "r"(b1), "r"(half[0]), "r"(half[1]));
  }
#endif
}

// A row's table in registers, four levels a register.
template <int BITS>
struct Table {
  uint32_t levels[BITS == 2 ? 1 : BITS == 3 ? 2 : 4];
};

// Levels of four codes, one per nibble of the selector's low half (bit 3 of each nibble clear).
template <int BITS>
__device__ __forceinline__ uint32_t look_up(const Table<BITS>& table, uint32_t selector) {
  static_assert(BITS < 4);
  // With two bits the table sits in both operands, so that one more register is never needed.
  return permute(table.levels[0], table.levels[BITS == 3 ? 1 : 0], selector);
}
// Sixteen levels: both halves, then a byte of either by `pick`, whose nibble j is j or j + 4.
__device__ __forceinline__ uint32_t look_up(const Table<4>& table, uint32_t selector, uint32_t pick) {
  const uint32_t low = permute(table.levels[0], table.levels[1], selector);
  const uint32_t high = permute(table.levels[2], table.levels[3], selector);
  return permute(low, high, pick);
}

// A fragments of two k-steps from BITS words. table[step][r].
template <int BITS>
__device__ __forceinline__ void expand(const uint32_t (&words)[BITS], const Table<BITS> (&table)[2][2],
                                       uint32_t (&a)[2][4]) {
  if constexpr (BITS == 2) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t h0 = bit_and(words[s], 0x33333333u), h1 = bit_and(shift_right<2>(words[s]), 0x33333333u);
      a[s][0] = look_up(table[s][0], h0);
      a[s][1] = look_up(table[s][1], shift_right<16>(h0));
      a[s][2] = look_up(table[s][0], h1);
      a[s][3] = look_up(table[s][1], shift_right<16>(h1));
    }
  } else if constexpr (BITS == 3) {
    uint32_t selector[4];
#pragma unroll
    for (int i = 0; i < 3; ++i) selector[i] = bit_and(words[i], 0x77777777u);
    selector[3] = and_or(shift_right<1>(words[2]), 0x44444444u,
                         and_or(shift_right<2>(words[1]), 0x22222222u, bit_and(shift_right<3>(words[0]), 0x11111111u)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2 * 2] = look_up(table[i / 2][0], selector[i]);
      a[i / 2][i % 2 * 2 + 1] = look_up(table[i / 2][1], shift_right<16>(selector[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t selector = bit_and(words[i], 0x77777777u);
      const uint32_t pick = and_or(shift_right<1>(words[i]), 0x44444444u, 0x32103210u);
      a[i / 2][i % 2 * 2] = look_up(table[i / 2][0], selector, pick);
      a[i / 2][i % 2 * 2 + 1] = look_up(table[i / 2][1], shift_right<16>(selector), shift_right<16>(pick));
    }
  }
}

// What a warp loads at a time: `sub_blocks` of a unit, with their tables and scales. A whole unit where two of them fit
// into registers, so that one is multiplied while the next is on its way; half or a quarter of it where groups are
// small and tables large. SLOT is the columns of a group, 0 for one group a row (then there are no scales to load).
template <int BITS, int SLOT>
struct Part {
  static constexpr int slot_columns = SLOT == 0 ? 128 : SLOT;
  static constexpr int levels = 1 << BITS;
  static constexpr int sub_blocks = BITS == 4 && SLOT == 32 ? 1 : SLOT == 32 || (SLOT == 64 && BITS > 2) ? 2 : 4;
  static constexpr int parts = unit_sub_blocks / sub_blocks;
  static constexpr int slots = sub_blocks * sub_block_columns / slot_columns;
  static constexpr int chunks = BITS * sub_blocks / 2;
  static constexpr int pieces = slots * levels / 16;
  static constexpr int scale_pieces = SLOT == 0 ? 0 : slots / 4;
  static constexpr int unit_bytes = 1024 * BITS + tile_rows * (unit_columns / slot_columns) * (levels + 2);
  static_assert(slots % 4 == 0 && slots * levels % 16 == 0 && BITS * sub_blocks % 2 == 0);

  uint4 codes[chunks];
  uint4 tables[2][pieces];
  uint4 scales[scale_pieces ? scale_pieces : 1];

  // From a unit of n sub-blocks. `codes_at` and `tables_at` are its first byte and its table area, each plus the lane's
  // own offset: 16 bytes per lane and per row. CHECKED: n may be less than 4; codes of a missing sub-block keep what
  // they were, and meet activations of zero.
  template <bool CHECKED>
  __device__ __forceinline__ void load(const uint8_t* codes_at, const uint8_t* tables_at, int part, int n) {
    const int present = CHECKED ? (BITS * n + 1) / 2 - part * chunks : chunks;
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      if (!CHECKED || c < present) codes[c] = load_weight(codes_at + (part * chunks + c) * 512);
    }
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      tables[0][p] = load_weight(tables_at + (part * pieces + p) * 256);
      tables[1][p] = load_weight(tables_at + (part * pieces + p) * 256 + 128);
    }
#pragma unroll
    for (int p = 0; p < scale_pieces; ++p) {
      scales[p] =
          load_weight(tables_at + tile_rows * (unit_columns / slot_columns) * levels + (part * scale_pieces + p) * 128);
    }
  }

  static __device__ __forceinline__ uint32_t component(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  // Word i of the lane's code words of this part.
  __device__ __forceinline__ uint32_t word(int i) const { return component(codes[i / 4], i % 4); }
  __device__ __forceinline__ Table<BITS> table(int r, int slot) const {
    Table<BITS> t;
#pragma unroll
    for (int i = 0; i < levels / 4; ++i) {
      const int at = slot * (levels / 4) + i;
      t.levels[i] = component(tables[r][at / 4], at % 4);
    }
    return t;
  }
  __device__ __forceinline__ float scale(int r, int slot) const {
    const uint32_t pair = component(scales[slot / 4], r * 2 + slot % 4 / 2);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(slot % 2 ? pair >> 16 : pair & 0xffffu)));
  }
};

// A fragments of sub-block `b` of a part: its four k-steps.
template <int BITS, int SLOT>
__device__ __forceinline__ void expand(const Part<BITS, SLOT>& part, int b, uint32_t (&a)[4][4]) {
  constexpr int steps_per_slot = Part<BITS, SLOT>::slot_columns / 32;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t words[BITS], expanded[2][4];
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i] = part.word((b * 2 + pair) * BITS + i);
    Table<BITS> table[2][2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int slot = (b * 4 + 2 * pair + s) / steps_per_slot;
      table[s][0] = part.table(0, slot);
      table[s][1] = part.table(1, slot);
    }
    expand<BITS>(words, table, expanded);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[2 * pair + i / 4][i % 4] = expanded[i / 4][i % 4];
  }
}

__device__ __forceinline__ int scaled(int sum_bits, float scale, int magic_sum) {
  return __float_as_int(__fmaf_rn(scale, __fsub_rn(__int_as_float(magic_sum), magic), __int_as_float(sum_bits)));
}

// The sums of a warp's 16 rows, for NT tiles of 8 tokens: c0..c3 of mma, as the bits of floats acc = fma(scale, I,
// acc); with one group a row, the integers themselves.
template <int SLOT, int NT>
struct Sums {
  int bits[NT][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < NT; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[t][i] = 0;
    }
  }

  // The B fragments from registers.
  template <int BITS>
  __device__ __forceinline__ void add(const Part<BITS, SLOT>& part, const uint32_t (*activation)[NT][8], int) {
    add(part, [&](int b, uint32_t (&of_sub_block)[NT][8]) {
#pragma unroll
      for (int t = 0; t < NT; ++t) {
#pragma unroll
        for (int i = 0; i < 8; ++i) of_sub_block[t][i] = activation[b][t][i];
      }
    });
  }

  // fetch(b, activation): those of sub-block b of the part.
  template <int BITS, class Fetch>
  __device__ __forceinline__ void add(const Part<BITS, SLOT>& part, const Fetch& fetch) {
    using PartType = Part<BITS, SLOT>;
    constexpr int steps_per_slot = PartType::slot_columns / 32, slots_per_sub_block = 4 / steps_per_slot;
#pragma unroll
    for (int b = 0; b < PartType::sub_blocks; ++b) {
      uint32_t activation[NT][8];
      fetch(b, activation);
      uint32_t a[4][4];
      expand<BITS, SLOT>(part, b, a);
#pragma unroll
      for (int slot = 0; slot < slots_per_sub_block; ++slot) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const int start[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
          int c[4];
#pragma unroll
          for (int i = 0; i < steps_per_slot; ++i) {
            const int s = slot * steps_per_slot + i;
            const uint32_t b0 = activation[t][2 * s], b1 = activation[t][2 * s + 1];
            if constexpr (SLOT == 0) {
              multiply(bits[t], a[s], b0, b1, bits[t]);
            } else if (i == 0) {
              multiply(c, a[s], b0, b1, start);
            } else {
              multiply(c, a[s], b0, b1, c);
            }
          }
          if constexpr (SLOT != 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              bits[t][i] = scaled(bits[t][i], part.scale(i / 2, b * slots_per_sub_block + slot), c[i]);
            }
          }
        }
      }
    }
  }
};

// One token fills only one of the eight columns of B. So each group of a part gets columns of its own: the token stands
// in those columns for the k-steps of the group, and zeros everywhere else. Then one chain of mma over the whole part
// leaves each group's sum in other lanes, lane q scales only its own (4 groups) or two (8 groups), and the sums over q
// are taken once, at the end: 8 instructions for the scales of a unit instead of 24.
template <int SLOT>
struct OneTokenSums {
  int bits[2];  // rows gr and gr + 8, of the groups of this lane's q

  __device__ __forceinline__ void clear() { bits[0] = bits[1] = 0; }

  // Whether lane gr's column of B is one of the slot's.
  template <int SLOTS>
  static __device__ __forceinline__ bool is_mine(int slot, int lane) {
    return (SLOTS == 4 ? lane / 8 : lane / 4) == slot;
  }

  template <int BITS>
  __device__ __forceinline__ void add(const Part<BITS, SLOT>& part, const uint32_t (*activation)[1][8], int lane) {
    using PartType = Part<BITS, SLOT>;
    const int start[4] = {magic_bits, magic_bits, magic_bits, magic_bits}, zero[4] = {0, 0, 0, 0};
    int c[4];
#pragma unroll
    for (int b = 0; b < PartType::sub_blocks; ++b) {
      uint32_t a[4][4];
      expand<BITS, SLOT>(part, b, a);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t b0 = activation[b][0][2 * s], b1 = activation[b][0][2 * s + 1];
        if (b == 0 && s == 0) {
          multiply(c, a[s], b0, b1, SLOT == 0 ? zero : start);
        } else {
          multiply(c, a[s], b0, b1, c);
        }
      }
    }
    if constexpr (SLOT == 0) {
      bits[0] += c[0];
      bits[1] += c[2];
    } else if constexpr (PartType::slots == 4) {
      const uint32_t selector = 0x10 + lane % 4 * 0x22;  // bytes 2q and 2q + 1
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& four = part.scales[0];
        const uint32_t half = permute(r ? four.z : four.x, r ? four.w : four.y, selector);
        bits[r] = scaled(bits[r], __half2float(__ushort_as_half(static_cast<unsigned short>(half))), c[2 * r]);
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 low = part.scales[0], high = part.scales[PartType::scale_pieces - 1];
        const uint32_t first = lane & 2 ? (r ? high.z : high.x) : (r ? low.z : low.x);
        const uint32_t second = lane & 2 ? (r ? high.w : high.y) : (r ? low.w : low.y);
        const uint32_t pair = lane & 1 ? second : first;
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&pair));
        bits[r] = scaled(scaled(bits[r], scale.x, c[2 * r]), scale.y, c[2 * r + 1]);
      }
    }
  }
};

// Adds two sums of the kind that Sums holds.
template <int SLOT>
__device__ __forceinline__ int add_sums(int a, int b) {
  return SLOT == 0 ? a + b : __float_as_int(__fadd_rn(__int_as_float(a), __int_as_float(b)));
}

}  // namespace rcp::cuda::fragments
