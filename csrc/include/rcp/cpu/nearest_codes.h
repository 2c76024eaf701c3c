// The code of the nearest level of every weight: the number of midpoints between neighbouring levels that lie below it.
// Codes are written as a byte each, or as the bit stream of the packed format (docs/format.md).
#pragma once

#include <array>
#include <cstring>

#include "rcp/codes.h"
#include "rcp/cpu/lanes.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"

#define RCP_KERNELS "rcp/cpu/nearest_codes_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

struct NearestCodes {
  const float* weight;  // [rows, columns]
  const float* table;   // [rows, groups, 2^bits], ascending
  int64_t rows, columns, group_size;
  int bits;

  int64_t groups() const { return (columns + group_size - 1) / group_size; }
  int64_t packed_bytes() const { return code_row_bytes(columns, group_size, bits); }
};

// Writes codes [rows, columns], one a byte, or with `packed` [rows, packed_bytes()].
inline void nearest_codes(const NearestCodes& a, bool packed, uint8_t* codes, Isa isa, const ThreadPool& pool) {
  const auto kernel = RCP_FOR_ISA(isa, codes_of);
  const int levels = 1 << a.bits;
  const int64_t width = packed ? a.packed_bytes() : a.columns, blocks = (width + a.bits - 1) / a.bits;
  // A second thread pays from about 64k weights (10 us) on.
  const ThreadPool threads = pool.serial_if(a.rows * a.columns < (1 << 16));
  parallel_pieces(threads, a.rows, std::max<int64_t>(1, (1 << 14) / a.columns), [&](int64_t begin, int64_t end) {
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
        // Halved first: the sum of two levels could overflow.
        for (int b = 0; b + 1 < levels; ++b)
          bounds[static_cast<std::size_t>(b)] = table[b + 1] * 0.5f + table[b] * 0.5f;
        kernel(a.weight + row * a.columns + first, n, bounds.data(), levels - 1, to + first);
      }
      if (!packed) continue;
      uint8_t* stream = codes + row * width;
      for (int64_t block = 0; block < blocks; ++block) {
        const uint64_t word = pack_eight_codes(plain + block * 8, a.bits);
        const int64_t at = block * a.bits, bytes = std::min<int64_t>(a.bits, width - at);
        for (int64_t i = 0; i < bytes; ++i) stream[at + i] = static_cast<uint8_t>(word >> (8 * i));
      }
    }
  });
}

}  // namespace rcp
