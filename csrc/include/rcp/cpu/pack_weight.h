// The canonical packed weight (docs/format.md) to the CPU's layout and back, and its values.
#pragma once

#include "rcp/cpu/lanes.h"
#include "rcp/cpu/lanes16.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/weight_layout.h"
#include "rcp/float_types.h"

#define RCP_KERNELS "rcp/cpu/dequantize_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

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
          for (int64_t k = 0; k < shape.group_columns(g); ++k) {
            const unsigned code = read_code(codes + row * row_bytes, g * shape.group_size + k, shape.bits);
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

namespace detail {

// Calls f(row, group, chunk row) for every group of every row. One thread has all groups of a row.
template <class F>
void for_each_chunk_row(const WeightShape& shape, const uint8_t* packed, const ThreadPool& pool, const F& f) {
  parallel_pieces(pool, shape.row_blocks(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * 16; row < end * 16 && row < shape.rows; ++row) {
      for (int64_t g = 0; g < shape.groups(); ++g) f(row, g, ChunkRow(shape, packed + sizeof(WeightHeader), row, g));
    }
  });
}

}  // namespace detail

// The exact inverse of pack_weight, with two differences: levels are tables int8 [rows, groups, 2^bits] for uniform
// groups too, and the codes of padding columns are 0.
inline void unpack_weight(const WeightShape& shape, const uint8_t* packed, uint8_t* codes, int8_t* levels,
                          uint16_t* scales, const ThreadPool& pool) {
  const int64_t groups = shape.groups(), row_bytes = shape.canonical_row_bytes();
  std::memset(codes, 0, static_cast<std::size_t>(shape.rows * row_bytes));
  detail::for_each_chunk_row(shape, packed, pool, [&](int64_t row, int64_t g, const ChunkRow& from) {
    for (int c = 0; c < shape.levels(); ++c) {
      levels[(row * groups + g) * shape.levels() + c] = static_cast<int8_t>(from.level(c));
    }
    for (int64_t k = 0; k < shape.group_columns(g); ++k) {
      write_code(codes + row * row_bytes, g * shape.group_size + k, shape.bits, from.code(k));
    }
    scales[row * groups + g] = from.scale();
  });
}

// y [rows, columns] of `type`: (float32(level) * float32(scale)) * tensor_scale, rounded once more to a narrower type.
inline void dequantize(const WeightShape& shape, const uint8_t* packed, float tensor_scale, void* y, FloatType type,
                       Isa isa, const ThreadPool& pool) {
  const auto kernel = RCP_FOR_ISA(isa, dequantize_row);
  detail::for_each_chunk_row(shape, packed, pool, [&](int64_t row, int64_t g, const ChunkRow& from) {
    float values[16] = {};
    for (int c = 0; c < shape.levels(); ++c) {
      values[c] = static_cast<float>(from.level(c)) * half_to_float(from.scale()) * tensor_scale;
    }
    kernel(from.codes(), shape.bits, static_cast<int>(row % 16), values, shape.group_columns(g), type, y,
           row * shape.columns + g * shape.group_size);
  });
}

}  // namespace rcp
