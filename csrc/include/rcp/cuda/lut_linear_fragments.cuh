// From packed codes to integer tensor-core products: the loads, table look-ups and products that the integer kernels of
// lut_linear share. The order of the bytes is in weight_layout.h.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "rcp/cuda/lut_linear_plan.h"
#include "rcp/cuda/ptx.cuh"
#include "rcp/cuda/quantize_token.cuh"
#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda::fragments {

using namespace ptx;

// A row's table in registers, four levels a register.
template <int BITS>
struct Table {
  uint32_t levels[BITS == 2 ? 1 : BITS == 3 ? 2 : 4];
};

// Levels of four codes, one per nibble of the selector's low half (bit 3 of each nibble clear).
template <int BITS>
__device__ __forceinline__ uint32_t look_up(const Table<BITS>& table, uint32_t selector) {
  static_assert(BITS < 4);
  // With two bits both operands are the table: no other register is needed.
  return permute(table.levels[0], table.levels[BITS == 3 ? 1 : 0], selector);
}
// Sixteen levels: a look-up in each half, then a byte of one of them by `pick`, whose nibble j is j or j + 4.
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

// A fragments of a sub-block: its four k-steps. word(i) is code word i of the lane in the sub-block, table(s, r) the
// table of row gr + 8r in k-step s.
template <int BITS, class Word, class TableOf>
__device__ __forceinline__ void expand(const Word& word, const TableOf& table, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t words[BITS], expanded[2][4];
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i] = word(pair * BITS + i);
    const Table<BITS> tables[2][2] = {{table(2 * pair, 0), table(2 * pair, 1)},
                                      {table(2 * pair + 1, 0), table(2 * pair + 1, 1)}};
    expand<BITS>(words, tables, expanded);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[2 * pair + i / 4][i % 4] = expanded[i / 4][i % 4];
  }
}

// A part of a unit in registers. GROUP is 32, 64, 128, or 0 for one group a row, which has no scales to load.
template <int BITS, int GROUP>
struct Part {
  static constexpr int slot_columns = GROUP == 0 ? 128 : GROUP, levels = 1 << BITS;
  static constexpr int sub_blocks = part_sub_blocks(BITS, GROUP), parts = unit_sub_blocks / sub_blocks;
  static constexpr int slots = sub_blocks * sub_block_columns / slot_columns, steps_per_slot = slot_columns / 32;
  static constexpr int code_vectors = BITS * sub_blocks / 2, table_vectors = slots * levels / 16;
  static constexpr int scale_vectors = GROUP == 0 ? 0 : slots / 4;
  static constexpr int unit_bytes = unit_layout<BITS, GROUP>().unit_bytes();
  static_assert(slots % 4 == 0 && slots * levels % 16 == 0 && BITS * sub_blocks % 2 == 0);

  uint4 codes[code_vectors];
  uint4 tables[2][table_vectors];
  uint4 scales[scale_vectors ? scale_vectors : 1];

  // Loads part `part` of a unit of n sub-blocks. `codes_at` and `tables_at` are the unit's first byte and its table
  // area, plus the lane's own offset: 16 bytes per lane, and 16 bytes per row. CHECKED: n may be less than 4. The codes
  // of a missing sub-block then keep their old values, which are multiplied by activations of zero.
  template <bool CHECKED>
  __device__ __forceinline__ void load(const uint8_t* codes_at, const uint8_t* tables_at, int part, int n) {
    const int present = CHECKED ? unit_layout<BITS, GROUP>().code_vectors(n) - part * code_vectors : code_vectors;
#pragma unroll
    for (int c = 0; c < code_vectors; ++c) {
      if (!CHECKED || c < present) codes[c] = load_vector(codes_at + (part * code_vectors + c) * 512);
    }
#pragma unroll
    for (int t = 0; t < table_vectors; ++t) {
      tables[0][t] = load_vector(tables_at + (part * table_vectors + t) * 256);
      tables[1][t] = load_vector(tables_at + (part * table_vectors + t) * 256 + 128);
    }
    const uint8_t* scales_at = tables_at + unit_layout<BITS, GROUP>().table_bytes();
#pragma unroll
    for (int i = 0; i < scale_vectors; ++i) scales[i] = load_vector(scales_at + (part * scale_vectors + i) * 128);
  }

  static __device__ __forceinline__ uint32_t component(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
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
  // A fragments of sub-block b of the part.
  __device__ __forceinline__ void expand(int b, uint32_t (&a)[4][4]) const {
    const auto word = [&](int i) { return component(codes[(b * 2 * BITS + i) / 4], (b * 2 * BITS + i) % 4); };
    fragments::expand<BITS>(word, [&](int s, int r) { return table(r, (b * 4 + s) / steps_per_slot); }, a);
  }
};

// The two vectors of B fragments that a lane has of a sub-block.
__device__ __forceinline__ void unpack(const uint4& low, const uint4& high, uint32_t (&to)[8]) {
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// fma(scale, I, sum), where sum_bits are the bits of a float and magic_sum is magic_bits + I.
__device__ __forceinline__ int scaled(int sum_bits, float scale, int magic_sum) {
  return __float_as_int(__fmaf_rn(scale, __fsub_rn(__int_as_float(magic_sum), magic), __int_as_float(sum_bits)));
}

// The sums of a warp's row tile for TOKEN_TILES token tiles: c0 .. c3 of mma, as the bits of floats. With one group a
// row they are the integers themselves.
template <int GROUP, int TOKEN_TILES>
struct Sums {
  int bits[TOKEN_TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * TOKEN_TILES; ++i) bits[i / 4][i % 4] = 0;
  }

  // With the B fragments in registers.
  template <int BITS>
  __device__ __forceinline__ void add(const Part<BITS, GROUP>& part, const uint32_t (*activation)[TOKEN_TILES][8],
                                      int) {
    add(part, [&](int b, uint32_t (&of_sub_block)[TOKEN_TILES][8]) {
#pragma unroll
      for (int i = 0; i < 8 * TOKEN_TILES; ++i) of_sub_block[i / 8][i % 8] = activation[b][i / 8][i % 8];
    });
  }

  // fetch(b, activation) gets the B fragments of sub-block b of the part.
  template <int BITS, class Fetch>
  __device__ __forceinline__ void add(const Part<BITS, GROUP>& part, const Fetch& fetch) {
    using PartType = Part<BITS, GROUP>;
    constexpr int steps = PartType::steps_per_slot, slots_per_sub_block = 4 / steps;
#pragma unroll
    for (int b = 0; b < PartType::sub_blocks; ++b) {
      uint32_t activation[TOKEN_TILES][8], a[4][4];
      fetch(b, activation);
      part.expand(b, a);
#pragma unroll
      for (int slot = 0; slot < slots_per_sub_block; ++slot) {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
          const int start[4] = {magic_bits, magic_bits, magic_bits, magic_bits};
          int c[4];
#pragma unroll
          for (int s = slot * steps; s < (slot + 1) * steps; ++s) {
            const uint32_t b0 = activation[t][2 * s], b1 = activation[t][2 * s + 1];
            if constexpr (GROUP == 0) {
              multiply(bits[t], a[s], b0, b1, bits[t]);
            } else if (s == slot * steps) {
              multiply(c, a[s], b0, b1, start);
            } else {
              multiply(c, a[s], b0, b1, c);
            }
          }
          if constexpr (GROUP != 0) {
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

// One token would fill only one of the eight columns of B. Instead each slot of a part gets columns of its own: they
// hold the token in the k-steps of the slot, and zeros elsewhere. A sum of mma over the whole part then leaves the
// sums of each group in other lanes. Lane q scales only its own sum (4 slots) or two sums (8 slots), and the sums over
// q are taken once, at the end: 8 instructions for the scales of a unit instead of 24.
template <int GROUP>
struct OneTokenSums {
  int bits[2];  // rows gr and gr + 8, of the groups of this lane's q

  __device__ __forceinline__ void clear() { bits[0] = bits[1] = 0; }

  // Whether lane gr's column of B belongs to the slot, of a part with that many slots.
  static __device__ __forceinline__ bool has_column(int slot, int slots, int lane) {
    return lane / (32 / slots) == slot;
  }

  template <int BITS>
  __device__ __forceinline__ void add(const Part<BITS, GROUP>& part, const uint32_t (*activation)[1][8], int lane) {
    using PartType = Part<BITS, GROUP>;
    constexpr int first = GROUP == 0 ? 0 : magic_bits;
    const int start[4] = {first, first, first, first}, zeros[4] = {0, 0, 0, 0};
    // Two chains halve the latency of the dependent mma: a warp that multiplies the last bytes to arrive has no other
    // work to hide it behind.
    int c[4], odd[4];
#pragma unroll
    for (int b = 0; b < PartType::sub_blocks; ++b) {
      uint32_t a[4][4];
      part.expand(b, a);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t b0 = activation[b][0][2 * s], b1 = activation[b][0][2 * s + 1];
        int (&chain)[4] = s % 2 ? odd : c;
        if (b == 0 && s < 2) {
          multiply(chain, a[s], b0, b1, s % 2 ? zeros : start);
        } else {
          multiply(chain, a[s], b0, b1, chain);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += odd[i];
    if constexpr (GROUP == 0) {
      bits[0] += c[0];
      bits[1] += c[2];
    } else if constexpr (PartType::slots == 4) {
      const uint32_t selector = 0x10 + (lane & 3) * 0x22;  // bytes 2q and 2q + 1
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& four = part.scales[0];
        const uint32_t half = permute(r ? four.z : four.x, r ? four.w : four.y, selector);
        bits[r] = scaled(bits[r], __half2float(__ushort_as_half(static_cast<unsigned short>(half))), c[2 * r]);
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 low = part.scales[0], high = part.scales[PartType::scale_vectors - 1];
        const uint32_t first_pair = lane & 2 ? (r ? high.z : high.x) : (r ? low.z : low.x);
        const uint32_t second_pair = lane & 2 ? (r ? high.w : high.y) : (r ? low.w : low.y);
        const uint32_t pair = lane & 1 ? second_pair : first_pair;
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&pair));
        bits[r] = scaled(scaled(bits[r], scale.x, c[2 * r]), scale.y, c[2 * r + 1]);
      }
    }
  }
};

// Adds two values of Sums::bits.
template <int GROUP>
__device__ __forceinline__ int add_sums(int a, int b) {
  return GROUP == 0 ? a + b : __float_as_int(__fadd_rn(__int_as_float(a), __int_as_float(b)));
}

}  // namespace rcp::cuda::fragments
