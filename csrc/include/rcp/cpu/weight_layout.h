// The CPU's order of a packed weight: what every CPU kernel of lut_linear streams.
//
// 16 rows are interleaved, so that a vector register holds the same 4 columns of 16 rows (a dword lane per row) and the
// activation is a broadcast dword. A block of 16 rows is a sequence of chunks, one per group, each
//
//   table   16 rows x 2^bits levels, one byte each, stored as level + 128 (unsigned: the first operand of vpdpbusd).
//           Uniform groups (level i = level 0 + i * 2^(7-bits)) have level 0 only, 16 bytes: the rest is a constant
//           that the kernels add in a register.
//   codes   64 * bits bytes per 32 columns
//   scales  16 x float16
//
// so that one pointer walks everything once. Columns are padded to a multiple of 32 inside a group, rows to a multiple
// of 16; activations are zero in padded columns, scales are zero in padded rows.
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

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "rcp/cpu/parallel.h"

namespace rcp {

struct WeightHeader {
  char magic[8];
  uint32_t layout_version;
  uint32_t bits;
  int64_t rows, columns, group_size;
  float tensor_scale;
  uint32_t uniform;  // 1: the table holds level 0 only
  uint32_t reserved[4];
};
static_assert(sizeof(WeightHeader) == 64, "the header keeps the chunks 64-byte aligned");

inline constexpr char cpu_weight_magic[8] = {'R', 'C', 'P', 'L', 'U', 'T', '1', '6'};
inline constexpr uint32_t cpu_layout_version = 1;

// Sizes that follow from (rows, columns, bits, group_size) and the kind of the groups.
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
  // Bytes of a row of codes in the canonical format.
  int64_t canonical_row_bytes() const { return (groups() * group_size * bits + 7) / 8; }

  // Throws std::invalid_argument where the numbers are outside the format.
  void check(const char* op) const {
    const std::string where = std::string(op) + ": ";
    if (bits < 2 || bits > 4)
      throw std::invalid_argument(where + "bits must be 2, 3 or 4, got " + std::to_string(bits) +
                                  "; quantize the weight to one of them");
    if (rows < 1 || columns < 1) {
      throw std::invalid_argument(where + "out_features and in_features must be at least 1, got " +
                                  std::to_string(rows) + " and " + std::to_string(columns) +
                                  "; an empty layer has nothing to pack");
    }
    if (group_size != 32 && group_size != 64 && group_size != 128 && group_size != columns) {
      throw std::invalid_argument(where + "group_size must be 32, 64, 128 or in_features (" + std::to_string(columns) +
                                  "), got " + std::to_string(group_size) +
                                  "; pass the one the weight was quantized with");
    }
    // 128 * 128 * 131071 is the largest group sum that an int32 holds.
    if (group_size > 131071) {
      throw std::invalid_argument(
          where + "a group may have at most 131071 columns, so that its integer sum is exact in int32, got " +
          std::to_string(group_size) + "; use group_size 128");
    }
  }
};

namespace detail {

inline unsigned read_code(const uint8_t* row, int64_t row_bytes, int64_t k, int bits) {
  const int64_t bit = k * bits, byte = bit >> 3;
  unsigned window = row[byte];
  if (byte + 1 < row_bytes) window |= static_cast<unsigned>(row[byte + 1]) << 8;
  return (window >> (bit & 7)) & ((1u << bits) - 1u);
}

// Where the code of (row r of 16, column k of the group) lives: a visitor, so that packing and unpacking cannot
// disagree. F(byte offset, bit offset, code bit it starts at, number of bits).
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

inline int64_t table_offset(int bits, int r, int code) {
  return bits == 4 ? 64 * (r % 4) + 16 * (r / 4) + code : 64 * (code / 4) + 4 * r + code % 4;
}

// What a code of row r of 16 stands for, + 128.
inline uint8_t biased_level(const WeightShape& shape, const uint8_t* chunk, int r, int code) {
  if (shape.uniform) return static_cast<uint8_t>(chunk[r] + (code << (7 - shape.bits)));
  return chunk[table_offset(shape.bits, r, code)];
}

}  // namespace detail

// The code of (row r of 16, column k of the group) in a chunk's code area.
inline unsigned code_at(const uint8_t* codes, int bits, int r, int64_t k) {
  unsigned code = 0;
  detail::visit_code(bits, r, k, [&](int64_t byte, int bit, int from, int count) {
    code |= ((static_cast<unsigned>(codes[byte]) >> bit) & ((1u << count) - 1u)) << from;
  });
  return code;
}

// codes uint8 [rows, canonical_row_bytes], levels int8 [rows, groups, stored_levels], scales float16 bits
// [rows, groups].
inline void pack_weight(const WeightShape& shape, const uint8_t* codes, const int8_t* levels, const uint16_t* scales,
                        float tensor_scale, uint8_t* packed, const ThreadPool& pool) {
  WeightHeader header{};
  std::memcpy(header.magic, cpu_weight_magic, 8);
  header.layout_version = cpu_layout_version;
  header.bits = static_cast<uint32_t>(shape.bits);
  header.rows = shape.rows;
  header.columns = shape.columns;
  header.group_size = shape.group_size;
  header.tensor_scale = tensor_scale;
  header.uniform = shape.uniform ? 1 : 0;
  std::memcpy(packed, &header, sizeof header);
  const int64_t groups = shape.groups(), row_bytes = shape.canonical_row_bytes();
  parallel_pieces(pool, shape.row_blocks(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* chunk = packed + sizeof header + block * shape.block_bytes();
      std::memset(chunk, 0, static_cast<std::size_t>(shape.block_bytes()));
      for (int64_t g = 0; g < groups; ++g, chunk += shape.chunk_bytes()) {
        uint8_t* out = chunk + shape.table_bytes();
        for (int r = 0; r < 16 && block * 16 + r < shape.rows; ++r) {
          const int64_t row = block * 16 + r;
          for (int c = 0; c < shape.stored_levels(); ++c) {
            chunk[shape.uniform ? r : detail::table_offset(shape.bits, r, c)] =
                static_cast<uint8_t>(levels[(row * groups + g) * shape.stored_levels() + c] + 128);
          }
          for (int64_t k = 0; k < shape.group_size && g * shape.group_size + k < shape.columns; ++k) {
            const unsigned code =
                detail::read_code(codes + row * row_bytes, row_bytes, g * shape.group_size + k, shape.bits);
            detail::visit_code(shape.bits, r, k, [&](int64_t byte, int bit, int from, int count) {
              out[byte] = static_cast<uint8_t>(out[byte] | (((code >> from) & ((1u << count) - 1u)) << bit));
            });
          }
          std::memcpy(out + shape.code_bytes() + 2 * r, scales + row * groups + g, 2);
        }
      }
    }
  });
}

// The exact inverse of pack_weight, but that levels are the whole tables, int8 [rows, groups, 2^bits], of uniform
// groups too; codes of padding columns come back as 0.
inline void unpack_weight(const WeightShape& shape, const uint8_t* packed, uint8_t* codes, int8_t* levels,
                          uint16_t* scales, const ThreadPool& pool) {
  const int64_t groups = shape.groups(), row_bytes = shape.canonical_row_bytes();
  parallel_pieces(pool, shape.row_blocks(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * 16; row < end * 16 && row < shape.rows; ++row) {
      const int r = static_cast<int>(row % 16);
      uint8_t* stream = codes + row * row_bytes;
      std::memset(stream, 0, static_cast<std::size_t>(row_bytes));
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* chunk = packed + sizeof(WeightHeader) + row / 16 * shape.block_bytes() + g * shape.chunk_bytes();
        for (int c = 0; c < shape.levels(); ++c) {
          levels[(row * groups + g) * shape.levels() + c] =
              static_cast<int8_t>(detail::biased_level(shape, chunk, r, c) - 128);
        }
        for (int64_t k = 0; k < shape.group_size && g * shape.group_size + k < shape.columns; ++k) {
          const unsigned code = code_at(chunk + shape.table_bytes(), shape.bits, r, k);
          const int64_t bit = (g * shape.group_size + k) * shape.bits;
          const unsigned shifted = code << (bit & 7);
          stream[bit >> 3] = static_cast<uint8_t>(stream[bit >> 3] | (shifted & 0xffu));
          if (shifted > 0xffu) stream[(bit >> 3) + 1] = static_cast<uint8_t>(stream[(bit >> 3) + 1] | (shifted >> 8));
        }
        std::memcpy(scales + row * groups + g, chunk + shape.table_bytes() + shape.code_bytes() + 2 * r, 2);
      }
    }
  });
}

// Throws unless a blob's header names the shape that the arguments do.
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

// Refuses a blob that is not a CPU-packed weight of exactly this shape, whose kind it then sets; returns its
// tensor_scale.
inline float check_packed(const char* op, WeightShape& shape, const uint8_t* packed, int64_t bytes) {
  const std::string where = std::string(op) + ": ";
  WeightHeader header;
  if (bytes < static_cast<int64_t>(sizeof header)) {
    throw std::invalid_argument(where + "weight must start with a 64-byte header, got " + std::to_string(bytes) +
                                " bytes; make it with pack_weight");
  }
  std::memcpy(&header, packed, sizeof header);
  if (std::memcmp(header.magic, cpu_weight_magic, 8) != 0) {
    throw std::invalid_argument(
        where +
        "weight is not packed for the CPU (wrong magic in its header); make it with pack_weight on this device");
  }
  if (header.layout_version != cpu_layout_version) {
    throw std::invalid_argument(where + "weight has CPU layout version " + std::to_string(header.layout_version) +
                                ", this build reads version " + std::to_string(cpu_layout_version) +
                                "; repack it from the canonical format");
  }
  check_packed_with(op, shape, {header.rows, header.columns, header.group_size, static_cast<int>(header.bits)});
  if (header.uniform > 1) {
    throw std::invalid_argument(where + "weight must have groups of kind 0 (table) or 1 (uniform), got " +
                                std::to_string(header.uniform) + "; its header is damaged, pack it again");
  }
  shape.uniform = header.uniform == 1;
  if (bytes != shape.packed_bytes()) {
    throw std::invalid_argument(where + "weight must have " + std::to_string(shape.packed_bytes()) +
                                " bytes for this shape, got " + std::to_string(bytes) + "; it is truncated or padded");
  }
  return header.tensor_scale;
}

}  // namespace rcp
