// lut_linear for bfloat16 x with act_bits 16, with AVX512-BF16 and VBMI. A level has at most 8 bits and is exact in
// bfloat16, so vdpbf16ps multiplies 32 weights an instruction. The low and the high byte of the level's bfloat16 come
// from one table each. Interleaving the two gives neighbouring columns of a row, two in a dword:
//   index, 2 x vpshufb, vpunpcklbw, vpunpckhbw, 2 x vdpbf16ps for 64 weights.
// lut_linear_float needs 17 instructions after its one look-up: 3 bits at 4096 x 4096 ran at 14.8 GB/s with it.
#pragma once

#include <array>

#include "rcp/cpu/lut_linear_avx512.h"

namespace rcp::avx512 {

#define RCP_AVX512_BF16 \
  __attribute__((target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// The low (0) or high (1) byte of a level's bfloat16, by level + 128.
template <int BYTE>
constexpr std::array<uint8_t, 256> bf16_bytes() {
  std::array<uint8_t, 256> bytes{};
  for (int biased = 0; biased < 256; ++biased) {
    const int level = biased - 128, magnitude = level < 0 ? -level : level;
    unsigned bits = 0;
    if (magnitude != 0) {
      int exponent = 7;
      while (magnitude >> exponent == 0) --exponent;
      bits =
          (static_cast<unsigned>(127 + exponent) << 7) | ((static_cast<unsigned>(magnitude) << (7 - exponent)) & 0x7fu);
    }
    if (level < 0) bits |= 0x8000u;
    bytes[static_cast<std::size_t>(biased)] = static_cast<uint8_t>(bits >> (8 * BYTE));
  }
  return bytes;
}

template <int BYTE>
RCP_AVX512_BF16 RCP_INLINE __m512i bf16_byte(__m512i biased) {
  alignas(64) static constexpr std::array<uint8_t, 256> bytes = bf16_bytes<BYTE>();
  const __m512i negative =
      _mm512_permutex2var_epi8(_mm512_load_si512(bytes.data()), biased, _mm512_load_si512(bytes.data() + 64));
  const __m512i positive =
      _mm512_permutex2var_epi8(_mm512_load_si512(bytes.data() + 128), biased, _mm512_load_si512(bytes.data() + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(biased), negative, positive);
}

template <int BYTE>
RCP_AVX512_BF16 RCP_INLINE void take_byte(Decoder<2>& decoder) {
  decoder.table = bf16_byte<BYTE>(decoder.table);
}
template <int BYTE>
RCP_AVX512_BF16 RCP_INLINE void take_byte(Decoder<3>& decoder) {
  take_byte<BYTE>(decoder.low);
  decoder.high_table = bf16_byte<BYTE>(decoder.high_table);
}
template <int BYTE>
RCP_AVX512_BF16 RCP_INLINE void take_byte(Decoder<4>& decoder) {
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) decoder.table[t] = bf16_byte<BYTE>(decoder.table[t]);
}

template <int BITS, int TOKENS>
RCP_AVX512_BF16 void lut_linear_bf16_tile(const LutLinearCall& call, int64_t token, int64_t begin, int64_t end) {
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group();
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* chunk = call.blocks + block * shape.block_bytes();
    __m512 total[TOKENS];
    for (int m = 0; m < TOKENS; ++m) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, chunk += shape.chunk_bytes()) {
      Decoder<BITS> low, high;
      const uint8_t* codes = load_tables<BITS>(low, chunk, shape.uniform);
      high = low;
      take_byte<0>(low);
      take_byte<1>(high);
      const uint16_t* x = call.x_bf16() + (g * call.tokens + token) * padded;
      // parts[m][p][h]: 128-bit lane l belongs to rows 4l + 2h and 4l + 2h + 1. Even dwords are part 2p of a row, odd
      // dwords part 2p + 1.
      __m512 parts[TOKENS][2][2];
#pragma GCC unroll 16
      for (int i = 0; i < 4 * TOKENS; ++i) parts[i / 4][i / 2 % 2][i % 2] = _mm512_setzero_ps();
      for (int64_t k = 0; k < padded; k += 32, codes += 64 * BITS) {
        __m512i low_bytes[8], high_bytes[8];
        prefetch_lines(codes + 32, BITS);
        low.expand(codes, low_bytes);
        high.expand(codes, high_bytes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const auto first = (__m512bh)_mm512_unpacklo_epi8(low_bytes[i], high_bytes[i]);
          const auto second = (__m512bh)_mm512_unpackhi_epi8(low_bytes[i], high_bytes[i]);
#pragma GCC unroll 4
          for (int m = 0; m < TOKENS; ++m) {
            int64_t four;
            std::memcpy(&four, x + m * padded + k + 4 * i, 8);
            const auto columns = (__m512bh)_mm512_set1_epi64(four);
            parts[m][i % 2][0] = _mm512_dpbf16_ps(parts[m][i % 2][0], first, columns);
            parts[m][i % 2][1] = _mm512_dpbf16_ps(parts[m][i % 2][1], second, columns);
          }
        }
      }
      const __m512 scales = load_scales(codes);
#pragma GCC unroll 4
      for (int m = 0; m < TOKENS; ++m) {
        __m512 pair[2];
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          pair[p] = _mm512_add_ps(_mm512_shuffle_ps(parts[m][p][0], parts[m][p][1], 0x88),
                                  _mm512_shuffle_ps(parts[m][p][0], parts[m][p][1], 0xDD));
        }
        total[m] = _mm512_fmadd_ps(scales, _mm512_add_ps(pair[0], pair[1]), total[m]);
      }
    }
    for (int m = 0; m < TOKENS; ++m) store_block(call, token + m, block, total[m]);
  }
}

template <int BITS>
RCP_AVX512_BF16 void lut_linear_bf16(const LutLinearCall& call, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 4 <= call.tokens; m += 4) lut_linear_bf16_tile<BITS, 4>(call, m, block, block + 1);
    for (; m < call.tokens; ++m) lut_linear_bf16_tile<BITS, 1>(call, m, block, block + 1);
  }
}

}  // namespace rcp::avx512
