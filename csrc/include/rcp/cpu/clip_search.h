// The range of each group of weights over which evenly spaced levels fit it best. It tries 24 ratios for both ends of
// the group's range together, then for the low end, then for the high end.
//
// Weights are first multiplied by the power of two that brings the largest into [0.5, 1). Steps and squares then stay
// in float32's range, and groups that differ by a power of two get the same ratios. Errors are float64 sums over the
// weights in order. The result is the same on every CPU and with any number of threads.
#pragma once

#include <array>
#include <cmath>

#include "rcp/cpu/lanes.h"
#include "rcp/cpu/level_groups.h"
#include "rcp/cpu/scratch.h"

namespace rcp {

using ClipRatios = std::array<float, 24>;

// 0.99, 0.96, ..., 0.30. A ratio is the sigmoid of a parameter. The ratio 1 would need an infinite parameter.
inline ClipRatios clip_ratios() {
  ClipRatios ratios;
  for (int i = 0; i < 24; ++i) ratios[static_cast<std::size_t>(i)] = static_cast<float>((99 - 3 * i) / 100.0);
  return ratios;
}

struct ClipSearchKernel {
  int64_t lanes;
  void (*tile)(const float* values, const float* importance, int64_t length, const float* lowest, const float* highest,
               int levels, const ClipRatios& ratios, float* best_low, float* best_high);
};

}  // namespace rcp

#define RCP_KERNELS "rcp/cpu/clip_search_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

namespace detail {

// Writes group `group` to one lane of [length][lanes], scaled so that its largest magnitude is in [0.5, 1). Also writes
// its smallest and its largest weight, scaled alike. An invalid group becomes zeros.
inline void clip_search_lane(const LevelGroups& g, int64_t group, bool valid, int64_t lanes, float* values, float* low,
                             float* high) {
  const float* from = g.values + group * g.length;
  double scale = 0.0;
  if (valid) {
    float largest = 0.0f;
    for (int64_t i = 0; i < g.length; ++i) largest = std::max(largest, std::fabs(from[i]));
    int exponent = 0;
    std::frexp(largest, &exponent);
    scale = std::ldexp(1.0, -exponent);
  }
  *low = 1.0f;
  *high = -1.0f;
  for (int64_t i = 0; i < g.length; ++i) {
    const float value = valid ? static_cast<float>(static_cast<double>(from[i]) * scale) : 0.0f;
    *low = std::min(*low, value);
    *high = std::max(*high, value);
    values[i * lanes] = value;
  }
}

}  // namespace detail

// Writes ratios [groups, 2]: of the low end and of the high end. Those of a group that `bad` reports are meaningless.
inline void clip_search(const LevelGroups& g, int count, float* ratios, FirstIndex& bad, Isa isa,
                        const ThreadPool& pool) {
  const bool weighted = g.importance != nullptr;
  const ClipSearchKernel& kernel =
      weighted ? RCP_FOR_ISA(isa, clip_search_kernel<true>) : RCP_FOR_ISA(isa, clip_search_kernel<false>);
  const ClipRatios tried = clip_ratios();
  const int64_t lanes = kernel.lanes, n = g.length;
  // A weight costs about 50 ns in all, so a second thread pays from a few hundred weights on.
  const bool small = g.groups * n < (1 << 10);
  const int64_t tiles = (g.groups + lanes - 1) / lanes, piece = std::max<int64_t>(1, (1 << 12) / (n * lanes));
  parallel_pieces(pool.serial_if(small), tiles, piece, [&](int64_t begin, int64_t end) {
    Scratch scratch((weighted ? 2 : 1) * Scratch::size_of<float>(n * lanes) + 4 * Scratch::size_of<float>(lanes));
    float* values = scratch.take<float>(n * lanes);
    float* importance = weighted ? scratch.take<float>(n * lanes) : nullptr;
    float* lowest = scratch.take<float>(lanes);
    float* highest = scratch.take<float>(lanes);
    float* best_low = scratch.take<float>(lanes);
    float* best_high = scratch.take<float>(lanes);
    for (int64_t first = begin * lanes; first < std::min(end * lanes, g.groups); first += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t group = std::min(first + lane, g.groups - 1);
        const bool valid = g.valid(group);
        if (!valid) bad.report(group);
        detail::clip_search_lane(g, group, valid, lanes, values + lane, lowest + lane, highest + lane);
        for (int64_t i = 0; weighted && i < n; ++i) importance[i * lanes + lane] = g.importance[group * n + i];
      }
      kernel.tile(values, importance, n, lowest, highest, count, tried, best_low, best_high);
      for (int64_t lane = 0; lane < std::min(lanes, g.groups - first); ++lane) {
        ratios[(first + lane) * 2] = best_low[lane];
        ratios[(first + lane) * 2 + 1] = best_high[lane];
      }
    }
  });
}

}  // namespace rcp
