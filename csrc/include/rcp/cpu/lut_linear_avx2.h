// lut_linear for AVX2: two registers of 8 rows for a block of 16. vpmaddubsw adds pairs of (level + 128) * q into
// 16-bit lanes. With q in [-8, 7] a lane holds eight such pairs (8 * 2 * 255 * 8 = 32640), with q in [0, 15] four (4 *
// 2 * 255 * 15 = 30600). 8-bit activations are therefore split into two planes of nibbles, q = 16 * high + low, and
// everything is exact.
#pragma once

#include <algorithm>

#include "rcp/cpu/lanes16_avx2.h"
#include "rcp/cpu/lut_linear_call.h"

namespace rcp::avx2 {

RCP_AVX2 RCP_INLINE __m256i load32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Turns the codes of 32 columns into 8 registers of level + 128 for rows 8 * half .. 8 * half + 7: register i holds
// columns 4i..4i+3. A 128-bit lane holds 4 rows, as with AVX-512.
template <int BITS>
struct Decoder;

template <>
struct Decoder<2> {
  __m256i table;
  RCP_AVX2 RCP_INLINE static __m256i row_offset() {
    return _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  }
  RCP_AVX2 RCP_INLINE void load(const uint8_t* chunk, int half) { table = load32(chunk + 32 * half); }
  // Level 0 of 8 rows, one byte each, in the low byte of the row's dword.
  RCP_AVX2 RCP_INLINE static __m256i rows(const uint8_t* chunk, int half) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(chunk + 8 * half)));
  }
  RCP_AVX2 RCP_INLINE static __m256i spread(const uint8_t* chunk, int half) {
    return _mm256_shuffle_epi8(rows(chunk, half), row_offset());
  }
  RCP_AVX2 RCP_INLINE void load_uniform(const uint8_t* chunk, int half) {
    table = _mm256_add_epi8(spread(chunk, half), _mm256_set1_epi32(0x60402000));
  }
  RCP_AVX2 RCP_INLINE static __m256i index(__m256i codes) {
    return _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi8(3)), row_offset());
  }
  RCP_AVX2 RCP_INLINE void expand(const uint8_t* codes, int half, __m256i w[8]) const {
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const __m256i c = load32(codes + 64 * part + 32 * half);
      w[4 * part + 0] = _mm256_shuffle_epi8(table, index(c));
      w[4 * part + 1] = _mm256_shuffle_epi8(table, index(_mm256_srli_epi32(c, 2)));
      w[4 * part + 2] = _mm256_shuffle_epi8(table, index(_mm256_srli_epi32(c, 4)));
      w[4 * part + 3] = _mm256_shuffle_epi8(table, index(_mm256_srli_epi32(c, 6)));
    }
  }
};

template <>
struct Decoder<3> {
  __m256i low_table, high_table;
  RCP_AVX2 RCP_INLINE void load(const uint8_t* chunk, int half) {
    low_table = load32(chunk + 32 * half);
    high_table = load32(chunk + 64 + 32 * half);
  }
  RCP_AVX2 RCP_INLINE void load_uniform(const uint8_t* chunk, int half) {
    low_table = _mm256_add_epi8(Decoder<2>::spread(chunk, half), _mm256_set1_epi32(0x30201000));
    high_table = _mm256_add_epi8(low_table, _mm256_set1_epi8(64));
  }
  // `upper` has each byte's third bit in its sign.
  RCP_AVX2 RCP_INLINE __m256i lookup(__m256i codes, __m256i upper) const {
    const __m256i index = Decoder<2>::index(codes);
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(low_table, index), _mm256_shuffle_epi8(high_table, index), upper);
  }
  RCP_AVX2 RCP_INLINE void expand(const uint8_t* codes, int half, __m256i w[8]) const {
    const __m256i high = load32(codes + 128 + 32 * half);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const __m256i c = load32(codes + 64 * part + 32 * half);
      w[4 * part + 0] = lookup(c, _mm256_slli_epi32(high, 7 - 4 * part));
      w[4 * part + 1] = lookup(_mm256_srli_epi32(c, 2), _mm256_slli_epi32(high, 6 - 4 * part));
      w[4 * part + 2] = lookup(_mm256_srli_epi32(c, 4), _mm256_slli_epi32(high, 5 - 4 * part));
      w[4 * part + 3] = lookup(_mm256_srli_epi32(c, 6), _mm256_slli_epi32(high, 4 - 4 * part));
    }
  }
};

template <>
struct Decoder<4> {
  __m256i table[4];
  RCP_AVX2 RCP_INLINE void load(const uint8_t* chunk, int half) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) table[t] = load32(chunk + 64 * t + 32 * half);
  }
  RCP_AVX2 RCP_INLINE void load_uniform(const uint8_t* chunk, int half) {
    const __m256i rows = Decoder<2>::rows(chunk, half);  // lane i, dword t: row 4i + t
    const __m256i ramp =
        _mm256_broadcastsi128_si256(_mm_set_epi8(120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0));
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m256i spread = _mm256_shuffle_epi8(rows, _mm256_set1_epi8(static_cast<char>(4 * t)));
      table[t] = _mm256_add_epi8(spread, ramp);
    }
  }
  RCP_AVX2 RCP_INLINE void expand(const uint8_t* codes, int half, __m256i w[8]) const {
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      __m256i v[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const __m256i c = load32(codes + 64 * t + 32 * half);
        v[t] =
            _mm256_shuffle_epi8(table[t], _mm256_and_si256(part ? _mm256_srli_epi32(c, 4) : c, _mm256_set1_epi8(15)));
      }
      const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
      const __m256i d = _mm256_unpacklo_epi32(v[2], v[3]), e = _mm256_unpackhi_epi32(v[2], v[3]);
      w[4 * part + 0] = _mm256_unpacklo_epi64(a, d);
      w[4 * part + 1] = _mm256_unpackhi_epi64(a, d);
      w[4 * part + 2] = _mm256_unpacklo_epi64(b, e);
      w[4 * part + 3] = _mm256_unpackhi_epi64(b, e);
    }
  }
};

RCP_AVX2 RCP_INLINE __m256i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}

RCP_AVX2 RCP_INLINE __m256 load_scales(const uint8_t* scales) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

RCP_AVX2 RCP_INLINE void store_block(const LutLinearCall& call, int64_t token, int64_t block, __m256 low, __m256 high) {
  const __m256 factor = _mm256_set1_ps(call.factor[token]);
  const lanes16::Lanes bias = call.bias ? lanes16::load(call.bias + 16 * block) : lanes16::set1(0.0f);
  lanes16::store_any(call.y, call.type, token * call.shape.rows + 16 * block, call.shape.rows - 16 * block,
                     {_mm256_fmadd_ps(low, factor, bias.a), _mm256_fmadd_ps(high, factor, bias.b)});
}

// As in lut_linear_avx512.h. Reading the two halves of a block together keeps the stream sequential.
inline constexpr int64_t prefetch_bytes = 8192;

RCP_AVX2 RCP_INLINE void prefetch_lines(const uint8_t* p, int lines) {
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p + prefetch_bytes + 64 * i), _MM_HINT_T0);
}

// Loads the tables of half a block.
template <int BITS>
RCP_AVX2 RCP_INLINE void load_tables(Decoder<BITS>& decoder, const uint8_t* chunk, int half, bool uniform) {
  if (uniform) {
    decoder.load_uniform(chunk, half);
  } else {
    decoder.load(chunk, half);
  }
}

// One chunk (16 rows x one group) times TOKENS tokens of PLANES nibble planes.
template <int BITS, int TOKENS, int PLANES>
RCP_AVX2 RCP_INLINE void add_chunk(const uint8_t* chunk, int64_t padded, bool uniform, const int8_t* q,
                                   const int32_t* correction, __m256 total[2][TOKENS]) {
  constexpr int rows = TOKENS * PLANES;
  // Registers of w whose products a 16-bit lane holds: 8 (32 columns) of signed nibbles, 4 of unsigned.
  constexpr int batch = PLANES == 1 ? 8 : 4;
  const __m256i ones = _mm256_set1_epi16(1);
  prefetch_lines(chunk, (16 * (1 << BITS) + 32 + 63) / 64);
  __m256i sum[2][rows];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) sum[half][m] = _mm256_setzero_si256();
  }
  Decoder<BITS> decoder[2];
  load_tables<BITS>(decoder[0], chunk, 0, uniform);
  load_tables<BITS>(decoder[1], chunk, 1, uniform);
  const uint8_t* codes = chunk + (uniform ? 16 : 16 * (1 << BITS));
  for (int64_t k = 0; k < padded; k += 32, codes += 64 * BITS) {
    prefetch_lines(codes + 32, BITS);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i w[8];
      decoder[half].expand(codes, half, w);
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 2
        for (int i0 = 0; i0 < 8; i0 += batch) {
          const int8_t* four = q + m * padded + k + 4 * i0;
          __m256i pairs = _mm256_maddubs_epi16(w[i0], broadcast4(four));
#pragma GCC unroll 8
          for (int i = 1; i < batch; ++i) {
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i0 + i], broadcast4(four + 4 * i)));
          }
          sum[half][m] = _mm256_add_epi32(sum[half][m], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256 scales = load_scales(codes + 16 * half);
#pragma GCC unroll 8
    for (int m = 0; m < TOKENS; ++m) {
      __m256i all = sum[half][m * PLANES];
      if constexpr (PLANES == 2) all = _mm256_add_epi32(all, _mm256_slli_epi32(sum[half][m * PLANES + 1], 4));
      all = _mm256_add_epi32(all, _mm256_set1_epi32(correction[m]));
      total[half][m] = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(all), total[half][m]);
    }
  }
}

template <int BITS, int TOKENS, int PLANES>
RCP_AVX2 void lut_linear_tile(const LutLinearCall& call, int64_t token, int64_t begin, int64_t end) {
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group();
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* chunk = call.blocks + block * shape.block_bytes();
    __m256 total[2][TOKENS];
    for (int m = 0; m < TOKENS; ++m) total[0][m] = total[1][m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, chunk += shape.chunk_bytes()) {
      add_chunk<BITS, TOKENS, PLANES>(chunk, padded, shape.uniform,
                                      call.q + (g * call.q_rows + token * PLANES) * padded,
                                      call.correction + g * call.tokens + token, total);
    }
    for (int m = 0; m < TOKENS; ++m) {
      store_block(call, token + m, block, total[0][m], total[1][m]);
    }
  }
}

template <int BITS, int PLANES>
RCP_AVX2 void lut_linear_integer(const LutLinearCall& call, int64_t begin, int64_t end) {
  if (call.tokens == 1) return lut_linear_tile<BITS, 1, PLANES>(call, 0, begin, end);
  // One row block at a time: its chunks are still in L2 for the next tokens.
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 4 <= call.tokens; m += 4) lut_linear_tile<BITS, 4, PLANES>(call, m, block, block + 1);
    for (; m < call.tokens; ++m) lut_linear_tile<BITS, 1, PLANES>(call, m, block, block + 1);
  }
}

template <int BITS, int TOKENS>
RCP_AVX2 void lut_linear_float_tile(const LutLinearCall& call, int64_t token, int64_t block) {
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group();
  __m256 totals[2][TOKENS];
  for (int half = 0; half < 2; ++half) {
    const uint8_t* chunk = call.blocks + block * shape.block_bytes();
    __m256 total[TOKENS];
    for (int m = 0; m < TOKENS; ++m) total[m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, chunk += shape.chunk_bytes()) {
      Decoder<BITS> decoder;
      load_tables<BITS>(decoder, chunk, half, shape.uniform);
      const uint8_t* codes = chunk + shape.table_bytes();
      const float* x = call.x + (g * call.tokens + token) * padded;
      __m256 parts[TOKENS][4];
#pragma GCC unroll 8
      for (int i = 0; i < 4 * TOKENS; ++i) parts[i / 4][i % 4] = _mm256_setzero_ps();
      for (int64_t k = 0; k < padded; k += 32, codes += 64 * BITS) {
        __m256i w[8];
        decoder.expand(codes, half, w);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m256i level = _mm256_xor_si256(w[i], _mm256_set1_epi8(-128));
#pragma GCC unroll 4
          for (const int j : {1, 0, 3, 2}) {
            const __m256 weight = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(level, 24 - 8 * j), 24));
            const int p = (2 * i + j / 2) % 4;
#pragma GCC unroll 2
            for (int m = 0; m < TOKENS; ++m) {
              parts[m][p] = _mm256_fmadd_ps(_mm256_set1_ps(x[m * padded + k + 4 * i + j]), weight, parts[m][p]);
            }
          }
        }
      }
      const __m256 scales = load_scales(codes + 16 * half);
#pragma GCC unroll 2
      for (int m = 0; m < TOKENS; ++m) {
        const __m256 sum =
            _mm256_add_ps(_mm256_add_ps(parts[m][0], parts[m][1]), _mm256_add_ps(parts[m][2], parts[m][3]));
        total[m] = _mm256_fmadd_ps(scales, sum, total[m]);
      }
    }
    for (int m = 0; m < TOKENS; ++m) totals[half][m] = total[m];
  }
  for (int m = 0; m < TOKENS; ++m) store_block(call, token + m, block, totals[0][m], totals[1][m]);
}

template <int BITS>
RCP_AVX2 void lut_linear_float(const LutLinearCall& call, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 2 <= call.tokens; m += 2) lut_linear_float_tile<BITS, 2>(call, m, block);
    if (m < call.tokens) lut_linear_float_tile<BITS, 1>(call, m, block);
  }
}

}  // namespace rcp::avx2
