// Groups of weights, the input of the ops that choose levels.
#pragma once

#include <cstdint>

#include "rcp/cpu/parallel.h"
#include "rcp/float_types.h"

namespace rcp {

inline constexpr int64_t max_levels = 256;

struct LevelGroups {
  const float* values;      // [groups, length]
  const float* importance;  // [groups, length], or null where all weights count alike
  int64_t groups, length;

  // Whether the values of a group are finite, and its importance is finite and at least 0.
  bool valid(int64_t group) const {
    uint32_t largest = 0;
    for (int64_t i = group * length; i < (group + 1) * length; ++i) {
      const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
      if (importance == nullptr) continue;
      // As unsigned integers, negative numbers are larger than NaN. The sum makes -0 positive.
      const uint32_t bits = bits_of(importance[i] + 0.0f);
      largest = bits > largest ? bits : largest;
    }
    return largest < 0x7f800000u;
  }
};

}  // namespace rcp
