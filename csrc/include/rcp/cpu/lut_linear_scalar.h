// lut_linear in plain C++, for any CPU.
#pragma once

#include <cmath>

#include "rcp/cpu/lut_linear_call.h"

namespace rcp::scalar {

template <bool INTEGER>
void lut_linear(const LutLinearCall& call, int64_t begin, int64_t end) {
  const WeightShape& shape = call.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group();
  for (int64_t row = begin * 16; row < end * 16 && row < shape.rows; ++row) {
    for (int64_t m = 0; m < call.tokens; ++m) {
      float total = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const ChunkRow weights(shape, call.blocks, row, g);
        int table[16];
        for (int c = 0; c < shape.levels(); ++c) table[c] = weights.level(c);
        float sum;
        if constexpr (INTEGER) {
          const int8_t* q = call.q + (g * call.tokens + m) * padded;
          int32_t exact = 0;
          for (int64_t k = 0; k < padded; ++k) exact += q[k] * table[weights.code(k)];
          sum = static_cast<float>(exact);
        } else {
          const float* x = call.x + (g * call.tokens + m) * padded;
          float parts[4] = {};
          for (int64_t at = 0; at < padded; ++at) {
            const int64_t k = at ^ 1;
            float& part = parts[k / 2 % 4];
            part = std::fma(x[k], static_cast<float>(table[weights.code(k)]), part);
          }
          sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
        total = std::fma(half_to_float(weights.scale()), sum, total);
      }
      const float bias = call.bias ? call.bias[row] : 0.0f;
      store_float(call.y, call.type, m * shape.rows + row, std::fma(total, call.factor[m], bias));
    }
  }
}

}  // namespace rcp::scalar
