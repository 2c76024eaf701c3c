// The CPU's layout of a packed weight: the order in which every CPU kernel of lut_linear reads it.
//
// 16 rows are interleaved: a vector register holds the same 4 columns of 16 rows, a dword lane for each row, and the
// activation is a broadcast dword. A block of 16 rows is a sequence of chunks, one for each group. A chunk is
//
//   table   16 rows x 2^bits levels, one byte each, stored as level + 128 (the unsigned first operand of vpdpbusd).
//           Uniform groups (level i = level 0 + i * 2^(7-bits)) have only level 0, 16 bytes: the kernels add the rest,
//           a constant, in a register.
//   codes   64 * bits bytes for each 32 columns
//   scales  16 x float16
//
// One pointer thus reads all of a weight once, in order. Columns are padded to a multiple of 32 inside a group, rows to
// a multiple of 16. Activations are zero in padded columns, scales are zero in padded rows.
//
//   uniform table byte r, at any bits.
//   2 bits  table byte 4r + c.  Per 16 columns 64 bytes: dword r, byte j, bits 2s..2s+1 = column 4s + j.
//   3 bits  table 64 bytes for levels 0..3 as above, then 64 for levels 4..7.
//           Per 32 columns 192 bytes: the low two bits as above (2 x 64), then bit t of byte j of dword r = high bit of
//           column 4t + j.
//   4 bits  table 4 x 64 bytes: byte 64t + 16i + c = row 4i + t.
//           Per 32 columns 4 x 64 bytes: byte 64t + 16i + b of row 4i + t holds column b (low nibble) and 16 + b
//           (high).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rcp/codes.h"

namespace rcp {

struct WeightHeader {
  char magic[8];
  uint32_t layout_version;
  uint32_t bits;
  int64_t rows, columns, group_size;
  float tensor_scale;
  uint32_t uniform;  // 1: the table holds only level 0
  uint32_t reserved[4];
};
static_assert(sizeof(WeightHeader) == 64, "the header keeps the chunks 64-byte aligned");

inline constexpr char cpu_weight_magic[8] = {'R', 'C', 'P', 'L', 'U', 'T', '1', '6'};
inline constexpr uint32_t cpu_layout_version = 1;

// The shape of a weight, and the sizes that follow from it.
struct WeightShape {
  int64_t rows, columns, group_size;
  int bits;
  bool uniform = false;

  int64_t groups() const { return (columns + group_size - 1) / group_size; }
  int64_t padded_group() const { return (group_size + 31) / 32 * 32; }
  int64_t row_blocks() const { return (rows + 15) / 16; }
  int levels() const { return 1 << bits; }
  int stored_levels() const { return uniform ? 1 : levels(); }
  int64_t table_bytes() const { return 16 * stored_levels(); }
  int64_t code_bytes() const { return padded_group() / 32 * 64 * bits; }
  int64_t chunk_bytes() const { return table_bytes() + code_bytes() + 32; }
  int64_t block_bytes() const { return groups() * chunk_bytes(); }
  int64_t packed_bytes() const { return static_cast<int64_t>(sizeof(WeightHeader)) + row_blocks() * block_bytes(); }
  int64_t canonical_row_bytes() const { return code_row_bytes(columns, group_size, bits); }
  // Columns of a group. The last group of a row may be shorter than the others.
  int64_t group_columns(int64_t group) const { return std::min(group_size, columns - group * group_size); }
};

// The shape of a weight. Throws std::invalid_argument where the numbers are outside the format.
inline WeightShape checked_shape(const std::string& op, int64_t rows, int64_t columns, int64_t bits,
                                 int64_t group_size) {
  const auto fail = [&](const std::string& message) { throw std::invalid_argument(op + ": " + message); };
  if (bits < 2 || bits > 4) {
    fail("bits must be 2, 3 or 4, got " + std::to_string(bits) + "; quantize the weight to one of them");
  }
  if (rows < 1 || columns < 1) {
    fail("out_features and in_features must be at least 1, got " + std::to_string(rows) + " and " +
         std::to_string(columns) + "; an empty layer has nothing to pack");
  }
  // 2^40 bounds every product of sizes.
  constexpr int64_t largest = int64_t{1} << 40;
  if (rows > largest || columns > largest || rows * (columns / 4096 + 1) > largest / 64) {
    fail("out_features * in_features must stay below 2^46, got " + std::to_string(rows) + " and " +
         std::to_string(columns) + "; these cannot be a layer's sizes");
  }
  if (group_size != 32 && group_size != 64 && group_size != 128 && group_size != columns) {
    fail("group_size must be 32, 64, 128 or in_features (" + std::to_string(columns) + "), got " +
         std::to_string(group_size) + "; pass the group_size that the weight was quantized with");
  }
  // 128 * 128 * 131071 is the largest group sum that an int32 holds.
  if (group_size > 131071) {
    fail("group_size must be at most 131071, got " + std::to_string(group_size) +
         ": the integer sum of a longer group can leave int32; use 128");
  }
  return {rows, columns, group_size, static_cast<int>(bits)};
}

namespace detail {

// Where the code of row r of 16 and column k of the group is. Packing and reading share this visitor, so they cannot
// disagree. Calls f(byte offset, bit offset, first bit of the code, number of bits).
template <class F>
void visit_code(int bits, int r, int64_t k, const F& f) {
  const int64_t unit = k / 32 * 64 * bits;
  const int kk = static_cast<int>(k % 32);
  if (bits == 4) {
    f(unit + 64 * (r % 4) + 16 * (r / 4) + kk % 16, 4 * (kk / 16), 0, 4);
    return;
  }
  f(unit + 64 * (kk / 16) + 4 * r + kk % 4, 2 * (kk % 16 / 4), 0, 2);
  if (bits == 3) f(unit + 128 + 4 * r + kk % 4, kk / 4, 2, 1);
}

// The codes of row r of 16 in 32 columns, a byte each: visit_code for all of them at once. `unit` is where the 32
// columns begin.
inline void codes_of_row(const uint8_t* unit, int bits, int r, uint8_t codes[32]) {
  if (bits == 4) {
    uint64_t words[2];
    std::memcpy(words, unit + 64 * (r % 4) + 16 * (r / 4), 16);
    for (uint64_t& word : words) {
      const uint64_t low = word & 0x0f0f0f0f0f0f0f0fu, high = word >> 4 & 0x0f0f0f0f0f0f0f0fu;
      std::memcpy(codes, &low, 8);
      std::memcpy(codes + 16, &high, 8);
      codes += 8;
    }
    return;
  }
  uint32_t third = 0;
  if (bits == 3) std::memcpy(&third, unit + 128 + 4 * r, 4);
  for (int half = 0; half < 2; ++half) {
    uint32_t word;
    std::memcpy(&word, unit + 64 * half + 4 * r, 4);
    for (int s = 0; s < 4; ++s, codes += 4) {
      const uint32_t four = (word >> (2 * s) & 0x03030303u) | (third >> (4 * half + s) & 0x01010101u) << 2;
      std::memcpy(codes, &four, 4);
    }
  }
}

inline int64_t table_offset(int bits, int r, int code) {
  return bits == 4 ? 64 * (r % 4) + 16 * (r / 4) + code : 64 * (code / 4) + 4 * r + code % 4;
}

}  // namespace detail

// One row of one chunk, read in plain C++.
class ChunkRow {
 public:
  ChunkRow(const WeightShape& shape, const uint8_t* blocks, int64_t row, int64_t group)
      : shape_(shape),
        r_(static_cast<int>(row % 16)),
        table_(blocks + row / 16 * shape.block_bytes() + group * shape.chunk_bytes()),
        codes_(table_ + shape.table_bytes()) {}

  unsigned code(int64_t k) const {
    unsigned code = 0;
    detail::visit_code(shape_.bits, r_, k, [&](int64_t byte, int bit, int from, int count) {
      code |= ((static_cast<unsigned>(codes_[byte]) >> bit) & ((1u << count) - 1u)) << from;
    });
    return code;
  }
  int level(int code) const {
    if (shape_.uniform) return static_cast<uint8_t>(table_[r_] + (code << (7 - shape_.bits))) - 128;
    return table_[detail::table_offset(shape_.bits, r_, code)] - 128;
  }
  // The codes of the whole chunk.
  const uint8_t* codes() const { return codes_; }
  // The bits of the float16.
  uint16_t scale() const {
    uint16_t half;
    std::memcpy(&half, codes_ + shape_.code_bytes() + 2 * r_, 2);
    return half;
  }

 private:
  const WeightShape& shape_;
  int r_;
  const uint8_t *table_, *codes_;
};

// Throws unless a blob's header has the shape that the arguments say.
inline void check_packed_with(const std::string& op, const WeightShape& shape, const WeightShape& header) {
  if (header.rows == shape.rows && header.columns == shape.columns && header.group_size == shape.group_size &&
      header.bits == shape.bits) {
    return;
  }
  const auto text = [](const WeightShape& s) {
    return "out_features " + std::to_string(s.rows) + ", in_features " + std::to_string(s.columns) + ", bits " +
           std::to_string(s.bits) + ", group_size " + std::to_string(s.group_size);
  };
  throw std::invalid_argument(op + ": the arguments say " + text(shape) + ", but the weight was packed with " +
                              text(header) + "; pass those");
}

// Throws unless the blob is a CPU-packed weight of this shape. Sets the shape's `uniform` and returns the tensor_scale.
inline float check_packed(const std::string& op, WeightShape& shape, const uint8_t* packed, int64_t bytes) {
  const auto fail = [&](const std::string& message) { throw std::invalid_argument(op + ": weight " + message); };
  WeightHeader header{};
  if (bytes < static_cast<int64_t>(sizeof header)) {
    fail("must start with a 64-byte header, got " + std::to_string(bytes) + " bytes; make it with pack_weight");
  }
  std::memcpy(&header, packed, sizeof header);
  if (std::memcmp(header.magic, cpu_weight_magic, 8) != 0) {
    fail("is not packed for the CPU (wrong magic in its header); make it with pack_weight on this device");
  }
  if (header.layout_version != cpu_layout_version) {
    fail("must have CPU layout version " + std::to_string(cpu_layout_version) + ", got " +
         std::to_string(header.layout_version) + "; repack it from the canonical format");
  }
  check_packed_with(op, shape, {header.rows, header.columns, header.group_size, static_cast<int>(header.bits)});
  if (header.uniform > 1) {
    fail("must have groups of kind 0 (table) or 1 (uniform), got " + std::to_string(header.uniform) +
         "; its header is damaged, pack it again");
  }
  shape.uniform = header.uniform == 1;
  if (bytes != shape.packed_bytes()) {
    fail("must have " + std::to_string(shape.packed_bytes()) + " bytes for this shape, got " + std::to_string(bytes) +
         "; it is truncated or padded");
  }
  return header.tensor_scale;
}

}  // namespace rcp
