// The canonical bit stream of codes (docs/format.md): code k of a row is bits [k * bits, (k + 1) * bits), lowest first.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RCP_CODES_INLINE __host__ __device__ inline
#else
#define RCP_CODES_INLINE inline
#endif

namespace rcp {

// Bytes of a row of codes, padded to whole groups.
RCP_CODES_INLINE int64_t code_row_bytes(int64_t columns, int64_t group_size, int bits) {
  return ((columns + group_size - 1) / group_size * group_size * bits + 7) / 8;
}

RCP_CODES_INLINE unsigned read_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  const int shift = static_cast<int>(bit & 7);
  unsigned window = row[bit >> 3];
  if (shift + bits > 8) window |= static_cast<unsigned>(row[(bit >> 3) + 1]) << 8;
  return (window >> shift) & ((1u << bits) - 1u);
}

// Into a row whose bits are still 0.
RCP_CODES_INLINE void write_code(uint8_t* row, int64_t k, int bits, unsigned code) {
  const int64_t bit = k * bits;
  const unsigned shifted = code << (bit & 7);
  row[bit >> 3] = static_cast<uint8_t>(row[bit >> 3] | (shifted & 0xffu));
  if (shifted > 0xffu) row[(bit >> 3) + 1] = static_cast<uint8_t>(row[(bit >> 3) + 1] | (shifted >> 8));
}

// Eight codes of one byte each as the low 8 * bits bits: first neighbours move together, then pairs, then fours.
inline uint64_t pack_eight_codes(const uint8_t* codes, int bits) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(codes[i]) << (8 * i);
  for (int width = 8, used = bits; width < 64; width *= 2, used *= 2) {
    const uint64_t field = ~uint64_t{0} >> (64 - 2 * used);
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += 2 * width) mask |= field << at;
    word = (word | (word >> (width - used))) & mask;
  }
  return word;
}

}  // namespace rcp
