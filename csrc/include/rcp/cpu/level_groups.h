// Groups of weights as the ops that choose levels take them: [groups, length], and an importance of each weight.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "rcp/cpu/parallel.h"
#include "rcp/float_types.h"

namespace rcp {

inline constexpr int64_t max_levels = 256;

struct LevelGroups {
  const float* values;      // [groups, length]
  const float* importance;  // the same shape, or null where all weights count alike
  int64_t groups, length;
};

inline bool is_finite(float value) {
  return (bits_of(value) & 0x7fffffffu) < 0x7f800000u;
}

// The first group that holds NaN or Inf, or an importance that is not finite or below 0; `groups` where there is none.
// Threads report to it in any order, and what remains does not depend on the order.
class FirstBad {
 public:
  explicit FirstBad(int64_t groups) : groups_(groups), first_(groups) {}

  bool check(const LevelGroups& g, int64_t group) {
    const float* values = g.values + group * g.length;
    uint32_t largest = 0;
    for (int64_t i = 0; i < g.length; ++i) {
      const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    bool good = largest < 0x7f800000u;
    if (g.importance != nullptr) {
      const float* importance = g.importance + group * g.length;
      // As unsigned integers, negative numbers are larger than NaN; -0 counts as 0.
      uint32_t most = 0;
      for (int64_t i = 0; i < g.length; ++i) {
        const uint32_t bits = bits_of(importance[i] + 0.0f);
        most = bits > most ? bits : most;
      }
      good = good && most < 0x7f800000u;
    }
    if (good) return true;
    int64_t seen = first_.load(std::memory_order_relaxed);
    while (group < seen && !first_.compare_exchange_weak(seen, group)) {
    }
    return false;
  }
  int64_t first() const { return first_.load(); }
  bool any() const { return first() < groups_; }

 private:
  int64_t groups_;
  std::atomic<int64_t> first_;
};

}  // namespace rcp
