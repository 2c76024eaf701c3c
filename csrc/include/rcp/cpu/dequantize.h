// A packed weight as a matrix of floats, on the CPU.
#pragma once

#include "rcp/cpu/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp {

// y [rows, columns] of `type`: (float32(level) * float32(scale)) * tensor_scale, rounded once more to a narrower type.
inline void dequantize(const WeightShape& shape, const uint8_t* packed, float tensor_scale, void* y, FloatType type,
                       const ThreadPool& pool) {
  const int64_t groups = shape.groups();
  parallel_pieces(pool, shape.row_blocks(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * 16; row < end * 16 && row < shape.rows; ++row) {
      const int r = static_cast<int>(row % 16);
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* chunk = packed + sizeof(WeightHeader) + row / 16 * shape.block_bytes() + g * shape.chunk_bytes();
        const uint8_t* codes = chunk + shape.table_bytes();
        uint16_t scale;
        std::memcpy(&scale, codes + shape.code_bytes() + 2 * r, 2);
        float values[16];
        for (int c = 0; c < shape.levels(); ++c) {
          const int level = detail::biased_level(shape, chunk, r, c) - 128;
          values[c] = static_cast<float>(level) * half_to_float(scale) * tensor_scale;
        }
        for (int64_t k = 0; k < shape.group_size && g * shape.group_size + k < shape.columns; ++k) {
          store_float(y, type, row * shape.columns + g * shape.group_size + k,
                      values[code_at(codes, shape.bits, r, k)]);
        }
      }
    }
  });
}

}  // namespace rcp
