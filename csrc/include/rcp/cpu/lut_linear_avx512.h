// lut_linear for AVX-512 with VNNI. A dword lane is a row, and 4 columns of the activation are a broadcast dword:
//   vpsrld, vpternlogd (mask and lane offset at once), vpshufb (4 rows x 4 levels per 128-bit lane), vpdpbusd.
#pragma once

#include <algorithm>

#include "rcp/cpu/lanes16_avx512.h"
#include "rcp/cpu/lut_linear_call.h"

namespace rcp::avx512 {

// Turns the codes of 32 columns (64 * BITS bytes) into 8 registers of level + 128: register i holds columns 4i..4i+3.
template <int BITS>
struct Decoder;

RCP_AVX512 RCP_INLINE __m512i row_in_lane() {
  return _mm512_set1_epi32(0x0c080400);
}

template <>
struct Decoder<2> {
  __m512i table;
  // Each byte of a dword gets the offset of its row in the 128-bit lane: 0, 4, 8 or 12.
  RCP_AVX512 RCP_INLINE static __m512i row_offset() {
    return _mm512_shuffle_epi8(row_in_lane(),
                               _mm512_broadcast_i32x4(_mm_set_epi32(0x03030303, 0x02020202, 0x01010101, 0)));
  }
  RCP_AVX512 RCP_INLINE void load(const uint8_t* chunk) { table = _mm512_loadu_si512(chunk); }
  // Level 0 of 16 rows, one byte each, in all bytes of the row's dword.
  RCP_AVX512 RCP_INLINE static __m512i spread(const uint8_t* first) {
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    return _mm512_shuffle_epi8(_mm512_cvtepu8_epi32(rows), row_offset());
  }
  RCP_AVX512 RCP_INLINE void load_uniform(const uint8_t* chunk) {
    table = _mm512_add_epi8(spread(chunk), _mm512_set1_epi32(0x60402000));
  }
  RCP_AVX512 RCP_INLINE static __m512i index(__m512i codes) {
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(3), row_offset(), 0xEA);  // (codes & 3) | offset
  }
  RCP_AVX512 RCP_INLINE void expand(const uint8_t* codes, __m512i w[8]) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i c = _mm512_loadu_si512(codes + 64 * half);
      w[4 * half + 0] = _mm512_shuffle_epi8(table, index(c));
      w[4 * half + 1] = _mm512_shuffle_epi8(table, index(_mm512_srli_epi32(c, 2)));
      w[4 * half + 2] = _mm512_shuffle_epi8(table, index(_mm512_srli_epi32(c, 4)));
      w[4 * half + 3] = _mm512_shuffle_epi8(table, index(_mm512_srli_epi32(c, 6)));
    }
  }
};

template <>
struct Decoder<3> {
  Decoder<2> low;
  __m512i high_table;
  RCP_AVX512 RCP_INLINE void load(const uint8_t* chunk) {
    low.load(chunk);
    high_table = _mm512_loadu_si512(chunk + 64);
  }
  RCP_AVX512 RCP_INLINE void load_uniform(const uint8_t* chunk) {
    low.table = _mm512_add_epi8(Decoder<2>::spread(chunk), _mm512_set1_epi32(0x30201000));
    high_table = _mm512_add_epi8(low.table, _mm512_set1_epi8(64));
  }
  // The masked shuffle replaces the bytes whose third bit is set. It needs no VBMI, and on Zen 5 it is as fast as
  // vpermi2b.
  RCP_AVX512 RCP_INLINE __m512i lookup(__m512i codes, __m512i high, int t) const {
    const __m512i index = Decoder<2>::index(codes);
    const __mmask64 upper = _mm512_test_epi8_mask(high, _mm512_set1_epi8(static_cast<char>(1 << t)));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(low.table, index), upper, high_table, index);
  }
  RCP_AVX512 RCP_INLINE void expand(const uint8_t* codes, __m512i w[8]) const {
    const __m512i high = _mm512_loadu_si512(codes + 128);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i c = _mm512_loadu_si512(codes + 64 * half);
      w[4 * half + 0] = lookup(c, high, 4 * half + 0);
      w[4 * half + 1] = lookup(_mm512_srli_epi32(c, 2), high, 4 * half + 1);
      w[4 * half + 2] = lookup(_mm512_srli_epi32(c, 4), high, 4 * half + 2);
      w[4 * half + 3] = lookup(_mm512_srli_epi32(c, 6), high, 4 * half + 3);
    }
  }
};

template <>
struct Decoder<4> {
  __m512i table[4];
  RCP_AVX512 RCP_INLINE void load(const uint8_t* chunk) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) table[t] = _mm512_loadu_si512(chunk + 64 * t);
  }
  RCP_AVX512 RCP_INLINE void load_uniform(const uint8_t* chunk) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk));
    const __m512i rows = _mm512_cvtepu8_epi32(first);  // lane i, dword t: row 4i + t
    const __m512i ramp =
        _mm512_broadcast_i32x4(_mm_set_epi8(120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0));
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m512i spread = _mm512_shuffle_epi8(rows, _mm512_set1_epi8(static_cast<char>(4 * t)));
      table[t] = _mm512_add_epi8(spread, ramp);
    }
  }
  RCP_AVX512 RCP_INLINE void expand(const uint8_t* codes, __m512i w[8]) const {
    const __m512i low_nibble = _mm512_set1_epi8(15);
    __m512i c[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) c[t] = _mm512_loadu_si512(codes + 64 * t);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const __m512i shifted = half ? _mm512_srli_epi32(c[t], 4) : c[t];
        v[t] = _mm512_shuffle_epi8(table[t], _mm512_and_si512(shifted, low_nibble));
      }
      // Lane i of v[t] is 16 columns of row 4i + t. A 4x4 transpose of dwords in each lane makes rows neighbours.
      const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
      const __m512i d = _mm512_unpacklo_epi32(v[2], v[3]), e = _mm512_unpackhi_epi32(v[2], v[3]);
      w[4 * half + 0] = _mm512_unpacklo_epi64(a, d);
      w[4 * half + 1] = _mm512_unpackhi_epi64(a, d);
      w[4 * half + 2] = _mm512_unpacklo_epi64(b, e);
      w[4 * half + 3] = _mm512_unpackhi_epi64(b, e);
    }
  }
};

RCP_AVX512 RCP_INLINE __m512 load_scales(const uint8_t* scales) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

RCP_AVX512 RCP_INLINE __m512i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

RCP_AVX512 RCP_INLINE void store_block(const LutLinearCall& call, int64_t token, int64_t block, __m512 total) {
  const __m512 bias = call.bias ? _mm512_loadu_ps(call.bias + 16 * block) : _mm512_setzero_ps();
  const __m512 y = _mm512_fmadd_ps(total, _mm512_set1_ps(call.factor[token]), bias);
  const int64_t at = token * call.shape.rows + 16 * block;
  lanes16::store_any(call.y, call.type, at, call.shape.rows - 16 * block, y);
}

// How far ahead a kernel prefetches weights. One core of a Zen 5 server (4096 x 4096, 2 bits, cold): 28.9 GB/s without
// prefetch, 32.4 with 4 KB, 33.7 with 8 KB, 33.4 with 16 KB. A plain read of the same memory: 36.5 GB/s.
inline constexpr int64_t prefetch_bytes = 8192;

RCP_AVX512 RCP_INLINE void prefetch_lines(const uint8_t* p, int lines) {
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p + prefetch_bytes + 64 * i), _MM_HINT_T0);
}

// Loads the tables of a chunk and prefetches those of a later chunk. Returns the address of the codes.
template <int BITS>
RCP_AVX512 RCP_INLINE const uint8_t* load_tables(Decoder<BITS>& decoder, const uint8_t* chunk, bool uniform) {
  if (uniform) {
    decoder.load_uniform(chunk);
    prefetch_lines(chunk, 1);
    return chunk + 16;
  }
  decoder.load(chunk);
  prefetch_lines(chunk, (16 * (1 << BITS) + 32 + 63) / 64);
  return chunk + 16 * (1 << BITS);
}

// One chunk (16 rows x one group) times a tile of TOKENS tokens. One or two tokens get several accumulators each: a
// single chain of dependent vpdpbusd would be bound by latency. The activations are embedded broadcasts, so a product
// is one instruction.
template <int BITS, int TOKENS>
RCP_AVX512 RCP_INLINE void add_chunk(const uint8_t* chunk, int64_t padded, bool uniform, const int8_t* q,
                                     const int32_t* correction, __m512 total[TOKENS]) {
  constexpr int chains = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  Decoder<BITS> decoder;
  const uint8_t* codes = load_tables<BITS>(decoder, chunk, uniform);
  __m512i sum[TOKENS][chains];
#pragma GCC unroll 16
  for (int m = 0; m < TOKENS; ++m) {
    sum[m][0] = _mm512_set1_epi32(correction[m]);
#pragma GCC unroll 4
    for (int c = 1; c < chains; ++c) sum[m][c] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < padded; k += 32) {
    __m512i w[8];
    prefetch_lines(codes + 32, BITS);
    decoder.expand(codes, w);
    codes += 64 * BITS;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 16
      for (int m = 0; m < TOKENS; ++m) {
        sum[m][i % chains] =
            _mm512_dpbusd_epi32(sum[m][i % chains], w[i], broadcast4(q + (k + 4 * i) * TOKENS + 4 * m));
      }
    }
  }
  const __m512 scales = load_scales(codes);
#pragma GCC unroll 16
  for (int m = 0; m < TOKENS; ++m) {
    __m512i all = sum[m][0];
    if constexpr (chains == 2) all = _mm512_add_epi32(all, sum[m][1]);
    if constexpr (chains == 4) {
      all = _mm512_add_epi32(_mm512_add_epi32(all, sum[m][1]), _mm512_add_epi32(sum[m][2], sum[m][3]));
    }
    total[m] = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(all), total[m]);
  }
}

// Reads BLOCKS row blocks side by side. On Intel cores one sequential stream reaches three quarters of DRAM's
// bandwidth, and four streams reach all of it. On Zen 5 one stream is best (33.7 GB/s against 23.8 with four).
template <int BITS, int TOKENS, int BLOCKS>
RCP_AVX512 void multiply_tile(const LutLinearCall& call, int64_t token, int64_t begin, int64_t end) {
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group();
  const int64_t chunk_bytes = shape.chunk_bytes(), block_bytes = shape.block_bytes();
  int64_t block = begin;
  for (; block + BLOCKS <= end; block += BLOCKS) {
    const uint8_t* chunk = call.blocks + block * block_bytes;
    __m512 total[BLOCKS][TOKENS];
    for (int b = 0; b < BLOCKS; ++b) {
      for (int m = 0; m < TOKENS; ++m) total[b][m] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < groups; ++g, chunk += chunk_bytes) {
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b) {
        add_chunk<BITS, TOKENS>(chunk + b * block_bytes, padded, shape.uniform,
                                call.q + (g * call.q_rows + token) * padded, call.correction + g * call.tokens + token,
                                total[b]);
      }
    }
    for (int b = 0; b < BLOCKS; ++b) {
      for (int m = 0; m < TOKENS; ++m) store_block(call, token + m, block + b, total[b][m]);
    }
  }
  if constexpr (BLOCKS > 1) {
    if (block < end) multiply_tile<BITS, TOKENS, 1>(call, token, block, end);
  }
}

// The most tokens of a tile: 12 accumulators, 8 decoded registers and the tables fit the 32 registers. On Zen 5, whose
// peak is 525 G products/s (two vpdpbusd a cycle), a tile of 12 runs at 437 G/s, of 8 at 403, of 16 at 415.
inline constexpr int64_t tile_tokens = 12;

using MultiplyTile = void (*)(const LutLinearCall&, int64_t, int64_t, int64_t);

template <int BITS>
inline MultiplyTile tile_kernel(int64_t tokens) {
  static const MultiplyTile kernels[] = {
      multiply_tile<BITS, 1, 1>, multiply_tile<BITS, 2, 1>,  multiply_tile<BITS, 3, 1>,  multiply_tile<BITS, 4, 1>,
      multiply_tile<BITS, 5, 1>, multiply_tile<BITS, 6, 1>,  multiply_tile<BITS, 7, 1>,  multiply_tile<BITS, 8, 1>,
      multiply_tile<BITS, 9, 1>, multiply_tile<BITS, 10, 1>, multiply_tile<BITS, 11, 1>, multiply_tile<BITS, 12, 1>};
  return kernels[tokens - 1];
}

template <int BITS>
RCP_AVX512 void lut_linear(const LutLinearCall& call, int64_t begin, int64_t end) {
  if (call.tiles == 1) {
    const bool four = call.tokens == 1 && call.streams == 4;
    return (four ? multiply_tile<BITS, 1, 4> : tile_kernel<BITS>(call.tokens))(call, 0, begin, end);
  }
  // One row block at a time: the first tile reads it from memory, the others find it in L1 or L2 and decode it again.
  // Keeping a pair of blocks decoded in L1, with 12 x 2 accumulators, is slower: 352 G products/s against 437.
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t tile = 0; tile < call.tiles; ++tile) {
      const int64_t token = call.tile_begin(tile);
      tile_kernel<BITS>(call.tile_begin(tile + 1) - token)(call, token, block, block + 1);
    }
  }
}

// 16-bit activations: each level becomes a float, and each weight is one fused multiply-add. Pairs of columns take
// turns at four accumulators, the odd column of a pair first. This is the order of vdpbf16ps
// (lut_linear_avx512_bf16.h).
template <int BITS, int TOKENS>
RCP_AVX512 void lut_linear_float_tile(const LutLinearCall& call, int64_t token, int64_t begin, int64_t end) {
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group();
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* chunk = call.blocks + block * shape.block_bytes();
    __m512 total[TOKENS];
    for (int m = 0; m < TOKENS; ++m) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, chunk += shape.chunk_bytes()) {
      Decoder<BITS> decoder;
      const uint8_t* codes = load_tables<BITS>(decoder, chunk, shape.uniform);
      const float* x = call.x + (g * call.tokens + token) * padded;
      __m512 parts[TOKENS][4];
#pragma GCC unroll 16
      for (int i = 0; i < 4 * TOKENS; ++i) parts[i / 4][i % 4] = _mm512_setzero_ps();
      for (int64_t k = 0; k < padded; k += 32, codes += 64 * BITS) {
        __m512i w[8];
        prefetch_lines(codes + 32, BITS);
        decoder.expand(codes, w);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512i level = _mm512_xor_si512(w[i], _mm512_set1_epi8(-128));
#pragma GCC unroll 4
          for (const int j : {1, 0, 3, 2}) {
            const __m512 weight = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(level, 24 - 8 * j), 24));
            const int p = (2 * i + j / 2) % 4;
#pragma GCC unroll 4
            for (int m = 0; m < TOKENS; ++m) {
              parts[m][p] = _mm512_fmadd_ps(_mm512_set1_ps(x[m * padded + k + 4 * i + j]), weight, parts[m][p]);
            }
          }
        }
      }
      const __m512 scales = load_scales(codes);
#pragma GCC unroll 4
      for (int m = 0; m < TOKENS; ++m) {
        const __m512 sum =
            _mm512_add_ps(_mm512_add_ps(parts[m][0], parts[m][1]), _mm512_add_ps(parts[m][2], parts[m][3]));
        total[m] = _mm512_fmadd_ps(scales, sum, total[m]);
      }
    }
    for (int m = 0; m < TOKENS; ++m) store_block(call, token + m, block, total[m]);
  }
}

template <int BITS>
RCP_AVX512 void lut_linear_float(const LutLinearCall& call, int64_t begin, int64_t end) {
  // One row block at a time: its chunks are still in L2 for the next tokens.
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 4 <= call.tokens; m += 4) lut_linear_float_tile<BITS, 4>(call, m, block, block + 1);
    for (; m < call.tokens; ++m) lut_linear_float_tile<BITS, 1>(call, m, block, block + 1);
  }
}

}  // namespace rcp::avx512
