// lut_linear with AMX int8, for many tokens. Codes decoded as for AVX-512, [columns / 4][16 rows][4], have the layout
// of tdpbsud's unsigned operand. The signed activations, 16 tokens x 64 columns, are loaded in their own layout.
//
// The tile instructions are a template parameter: AmxTiles issues them, and SoftTiles (tests/native) computes their
// results as the manual defines them. The algorithm is thus tested on machines without AMX.
#pragma once

#include "rcp/cpu/lut_linear_avx512.h"

namespace rcp::amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the operand of ldtilecfg");

// Tiles 0..3 are sums (16 tokens x 16 rows, int32), 4 and 5 activations, 6 and 7 weights.
inline TileConfig tile_config(int64_t depth) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.column_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth : 64);
    config.rows[t] = static_cast<uint8_t>(t >= 6 ? depth / 4 : 16);
  }
  return config;
}

struct AmxTiles {
  RCP_AMX RCP_INLINE static void configure(const TileConfig& config) { _tile_loadconfig(&config); }
  RCP_AMX RCP_INLINE static void release() { _tile_release(); }
  template <int T>
  RCP_AMX RCP_INLINE static void zero() {
    if constexpr (T == 0) _tile_zero(0);
    if constexpr (T == 1) _tile_zero(1);
    if constexpr (T == 2) _tile_zero(2);
    if constexpr (T == 3) _tile_zero(3);
  }
  // GCC's tile intrinsics are asm without a memory clobber. The fences keep the decoder's stores before the loads.
  template <int T>
  RCP_AMX RCP_INLINE static void load(const void* p, int64_t stride) {
    __asm__ volatile("" ::: "memory");
    if constexpr (T == 0) _tile_loadd(0, p, stride);
    if constexpr (T == 1) _tile_loadd(1, p, stride);
    if constexpr (T == 2) _tile_loadd(2, p, stride);
    if constexpr (T == 3) _tile_loadd(3, p, stride);
    if constexpr (T == 4) _tile_loadd(4, p, stride);
    if constexpr (T == 5) _tile_loadd(5, p, stride);
    if constexpr (T == 6) _tile_loadd(6, p, stride);
    if constexpr (T == 7) _tile_loadd(7, p, stride);
  }
  template <int T>
  RCP_AMX RCP_INLINE static void store(void* p, int64_t stride) {
    if constexpr (T == 0) _tile_stored(0, p, stride);
    if constexpr (T == 1) _tile_stored(1, p, stride);
    if constexpr (T == 2) _tile_stored(2, p, stride);
    if constexpr (T == 3) _tile_stored(3, p, stride);
    __asm__ volatile("" ::: "memory");
  }
  // Tile 2 * I + J += activations of tile 4 + I times weights of tile 6 + J.
  template <int I, int J>
  RCP_AMX RCP_INLINE static void multiply() {
    if constexpr (I == 0 && J == 0) _tile_dpbsud(0, 4, 6);
    if constexpr (I == 0 && J == 1) _tile_dpbsud(1, 4, 7);
    if constexpr (I == 1 && J == 0) _tile_dpbsud(2, 5, 6);
    if constexpr (I == 1 && J == 1) _tile_dpbsud(3, 5, 7);
  }
};

inline constexpr int64_t tile_columns = 256;  // columns decoded at a time: 16 KB for a pair of row blocks
inline constexpr int64_t block_tokens = 128;  // their sums and their totals take 16 KB each

// Decodes columns [k0, k0 + columns) of a chunk, register i to out + i * stride.
template <int BITS>
RCP_AVX512 inline void decode_columns(const uint8_t* chunk, bool uniform, int64_t k0, int64_t columns, uint8_t* out,
                                      int64_t stride) {
  avx512::Decoder<BITS> decoder;
  const uint8_t* codes = avx512::load_tables<BITS>(decoder, chunk, uniform) + k0 / 32 * 64 * BITS;
  for (int64_t k = 0; k < columns; k += 32, codes += 64 * BITS) {
    __m512i w[8];
    avx512::prefetch_lines(codes + 32, BITS);
    decoder.expand(codes, w);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, out += stride) _mm512_store_si512(out, w[i]);
  }
}

// 16 or (TWO) 32 tokens x 32 rows over the decoded columns of a group.
template <class Tiles, bool TWO>
RCP_AMX RCP_INLINE void multiply_tiles(const uint8_t* weights, int64_t columns, int64_t depth, const int8_t* q,
                                       int64_t stride, bool first, int32_t* sums) {
  if (first) {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    if constexpr (TWO) Tiles::template zero<2>();
    if constexpr (TWO) Tiles::template zero<3>();
  } else {
    Tiles::template load<0>(sums, 128);
    Tiles::template load<1>(sums + 16, 128);
    if constexpr (TWO) Tiles::template load<2>(sums + 16 * 32, 128);
    if constexpr (TWO) Tiles::template load<3>(sums + 16 * 32 + 16, 128);
  }
  for (int64_t k = 0; k < columns; k += depth) {
    Tiles::template load<6>(weights + k / 4 * 128, 128);
    Tiles::template load<7>(weights + k / 4 * 128 + 64, 128);
    Tiles::template load<4>(q + k, stride);
    Tiles::template multiply<0, 0>();
    Tiles::template multiply<0, 1>();
    if constexpr (TWO) {
      Tiles::template load<5>(q + k + 16 * stride, stride);
      Tiles::template multiply<1, 0>();
      Tiles::template multiply<1, 1>();
    }
  }
  Tiles::template store<0>(sums, 128);
  Tiles::template store<1>(sums + 16, 128);
  if constexpr (TWO) Tiles::template store<2>(sums + 16 * 32, 128);
  if constexpr (TWO) Tiles::template store<3>(sums + 16 * 32 + 16, 128);
}

template <int BITS, class Tiles>
RCP_AMX void lut_linear_many(const LutLinearCall& call, int64_t begin, int64_t end) {
  using namespace avx512;
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group(), tokens = call.tokens;
  const int64_t depth = padded % 64 == 0 ? 64 : 32;
  alignas(64) uint8_t weights[tile_columns / 4 * 128];
  alignas(64) float totals[block_tokens * 32];
  alignas(64) int32_t sums[block_tokens * 32];
  Tiles::configure(tile_config(depth));
  for (int64_t block = begin; block < end; block += 2) {
    const uint8_t* chunks[2] = {call.blocks + block * shape.block_bytes(), nullptr};
    chunks[1] = block + 1 < end ? chunks[0] + shape.block_bytes() : chunks[0];
    std::fill_n(totals, tokens * 32, 0.0f);
    for (int64_t g = 0; g < groups; ++g, chunks[0] += shape.chunk_bytes(), chunks[1] += shape.chunk_bytes()) {
      for (int64_t k0 = 0; k0 < padded; k0 += tile_columns) {
        const int64_t columns = std::min(tile_columns, padded - k0);
        for (int b = 0; b < 2; ++b) decode_columns<BITS>(chunks[b], shape.uniform, k0, columns, weights + 64 * b, 128);
        for (int64_t m = 0; m < tokens; m += 32) {
          const int8_t* q = call.q + (g * call.q_rows + m) * padded + k0;
          if (m + 16 < call.q_rows) {
            multiply_tiles<Tiles, true>(weights, columns, depth, q, padded, k0 == 0, sums + 32 * m);
          } else {
            multiply_tiles<Tiles, false>(weights, columns, depth, q, padded, k0 == 0, sums + 32 * m);
          }
        }
      }
      const int64_t scale_at = shape.table_bytes() + shape.code_bytes();
      const __m512 scales[2] = {load_scales(chunks[0] + scale_at), load_scales(chunks[1] + scale_at)};
      for (int64_t m = 0; m < tokens; ++m) {
        const __m512i correction = _mm512_set1_epi32(call.correction[g * tokens + m]);
        for (int b = 0; b < 2; ++b) {
          const __m512 sum =
              _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(sums + 32 * m + 16 * b), correction));
          float* total = totals + 32 * m + 16 * b;
          _mm512_store_ps(total, _mm512_fmadd_ps(scales[b], sum, _mm512_load_ps(total)));
        }
      }
    }
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t b = 0; b < 2 && block + b < end; ++b)
        store_block(call, m, block + b, _mm512_load_ps(totals + 32 * m + 16 * b));
    }
  }
  Tiles::release();
}

}  // namespace rcp::amx
