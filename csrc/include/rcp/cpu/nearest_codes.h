// The nearest level of every weight: how many midpoints between neighbouring levels lie below it, a byte a code or as
// the bit stream of the packed format (docs/format.md).
#pragma once

#include <array>
#include <cstring>

#include "rcp/cpu/isa.h"
#include "rcp/cpu/lanes_scalar.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"
#if RCP_X86
#include "rcp/cpu/lanes_avx2.h"
#include "rcp/cpu/lanes_avx512.h"
#endif

namespace rcp {

namespace scalar {
#define RCP_LANES_TARGET
#include "rcp/cpu/nearest_codes_vector.h"
#undef RCP_LANES_TARGET
}  // namespace scalar
#if RCP_X86
namespace avx2 {
#define RCP_LANES_TARGET RCP_AVX2
#include "rcp/cpu/nearest_codes_vector.h"
#undef RCP_LANES_TARGET
}  // namespace avx2
namespace avx512 {
#define RCP_LANES_TARGET RCP_AVX512
#include "rcp/cpu/nearest_codes_vector.h"
#undef RCP_LANES_TARGET
}  // namespace avx512
#endif

using CodesKernel = void (*)(const float* weights, int64_t n, const float* bounds, int count, uint8_t* codes);

inline CodesKernel codes_kernel(Isa isa) {
#if RCP_X86
  if (isa >= Isa::avx512) return avx512::codes_of;
  if (isa == Isa::avx2) return avx2::codes_of;
#endif
  (void)isa;
  return scalar::codes_of;
}

struct NearestCodes {
  const float* weight;  // [rows, columns]
  const float* table;   // [rows, groups, 2^bits], ascending
  int64_t rows, columns, group_size;
  int bits;

  int64_t groups() const { return (columns + group_size - 1) / group_size; }
  int64_t packed_bytes() const { return (groups() * group_size * bits + 7) / 8; }
};

// Eight codes, one a byte, as the low 8 * bits bits: neighbours move together, then pairs, then fours.
inline uint64_t pack_eight(const uint8_t* codes, int bits) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(codes[i]) << (8 * i);
  int width = 8, used = bits;
  for (; width < 64; width *= 2, used *= 2) {
    const uint64_t field = ~uint64_t{0} >> (64 - 2 * used);
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += 2 * width) mask |= field << at;
    word = (word | (word >> (width - used))) & mask;
  }
  return word;
}

// Writes codes [rows, columns], or [rows, packed_bytes()] where `packed`.
inline void nearest_codes(const NearestCodes& a, bool packed, uint8_t* codes, Isa isa, ThreadPool pool) {
  const CodesKernel kernel = codes_kernel(isa);
  const int levels = 1 << a.bits;
  const int64_t width = packed ? a.packed_bytes() : a.columns, blocks = (width + a.bits - 1) / a.bits;
  // A thread is worth waking for about 64k weights (10 us).
  if (a.rows * a.columns < (1 << 16)) pool.threads = 1;
  parallel_pieces(pool, a.rows, std::max<int64_t>(1, (1 << 14) / a.columns), [&](int64_t begin, int64_t end) {
    const int64_t padded = packed ? std::max(blocks * 8, a.columns) : 0;
    Scratch scratch(Scratch::size_of<uint8_t>(padded));
    uint8_t* plain = scratch.take<uint8_t>(padded);
    if (packed) std::memset(plain, 0, static_cast<std::size_t>(padded));
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* to = packed ? plain : codes + row * a.columns;
      for (int64_t g = 0; g < a.groups(); ++g) {
        const int64_t first = g * a.group_size, n = std::min(a.group_size, a.columns - first);
        const float* table = a.table + (row * a.groups() + g) * levels;
        std::array<float, 15> bounds{};
        // Halved before the sum, which could overflow.
        for (int b = 0; b + 1 < levels; ++b)
          bounds[static_cast<std::size_t>(b)] = table[b + 1] * 0.5f + table[b] * 0.5f;
        kernel(a.weight + row * a.columns + first, n, bounds.data(), levels - 1, to + first);
      }
      if (!packed) continue;
      uint8_t* stream = codes + row * width;
      for (int64_t block = 0; block < blocks; ++block) {
        const uint64_t word = pack_eight(plain + block * 8, a.bits);
        const int64_t at = block * a.bits, bytes = std::min<int64_t>(a.bits, width - at);
        for (int64_t i = 0; i < bytes; ++i) stream[at + i] = static_cast<uint8_t>(word >> (8 * i));
      }
    }
  });
}

}  // namespace rcp
