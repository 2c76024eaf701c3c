// The range of each group of weights over which evenly spaced levels fit it best: 24 ratios for both ends of the
// group's range together, then for the low end, then for the high end.
//
// Weights are first multiplied by a power of two that brings the largest into [0.5, 1), so that neither a step nor a
// square leaves float32, and groups that differ by a power of two get the same ratios. Errors are float64 sums over the
// weights in order. The result is the same on every CPU and with any number of threads.
#pragma once

#include <array>
#include <cmath>

#include "rcp/cpu/isa.h"
#include "rcp/cpu/lanes_scalar.h"
#include "rcp/cpu/level_groups.h"
#include "rcp/cpu/scratch.h"
#if RCP_X86
#include "rcp/cpu/lanes_avx2.h"
#include "rcp/cpu/lanes_avx512.h"
#endif

namespace rcp {

using ClipRatios = std::array<float, 24>;

// 0.99, 0.96, ..., 0.30, the widest first. 0.99 and not 1: as the sigmoid of a parameter, 1 would be at infinity.
inline ClipRatios clip_ratios() {
  ClipRatios ratios;
  for (int i = 0; i < 24; ++i) ratios[static_cast<std::size_t>(i)] = static_cast<float>((99 - 3 * i) / 100.0);
  return ratios;
}

namespace scalar {
#define RCP_LANES_TARGET
#include "rcp/cpu/clip_search_vector.h"
#undef RCP_LANES_TARGET
}  // namespace scalar
#if RCP_X86
namespace avx2 {
#define RCP_LANES_TARGET RCP_AVX2
#include "rcp/cpu/clip_search_vector.h"
#undef RCP_LANES_TARGET
}  // namespace avx2
namespace avx512 {
#define RCP_LANES_TARGET RCP_AVX512
#include "rcp/cpu/clip_search_vector.h"
#undef RCP_LANES_TARGET
}  // namespace avx512
#endif

struct ClipSearchKernel {
  int64_t lanes;
  void (*tile)(const float* values, const float* importance, int64_t length, const float* lowest, const float* highest,
               int levels, const ClipRatios& ratios, float* best_low, float* best_high);
};

template <bool WEIGHTED>
ClipSearchKernel clip_search_kernel(Isa isa) {
#if RCP_X86
  if (isa >= Isa::avx512) return {avx512::lanes::count, avx512::clip_search_tile<WEIGHTED>};
  if (isa == Isa::avx2) return {avx2::lanes::count, avx2::clip_search_tile<WEIGHTED>};
#endif
  (void)isa;
  return {scalar::lanes::count, scalar::clip_search_tile<WEIGHTED>};
}

// Writes [groups, 2]: the ratio of the low end and that of the high end; those of a group that `bad` reports are of no
// meaning.
inline void clip_search(const LevelGroups& g, int count, float* ratios, FirstBad& bad, Isa isa, ThreadPool pool) {
  const bool weighted = g.importance != nullptr;
  const ClipSearchKernel kernel = weighted ? clip_search_kernel<true>(isa) : clip_search_kernel<false>(isa);
  const ClipRatios tried = clip_ratios();
  const int64_t lanes = kernel.lanes, n = g.length;
  // A weight costs about 50 ns in all: a thread is worth waking for a few hundred.
  if (g.groups * n < (1 << 10)) pool.threads = 1;
  const int64_t tiles = (g.groups + lanes - 1) / lanes;
  parallel_pieces(pool, tiles, std::max<int64_t>(1, (1 << 12) / (n * lanes)), [&](int64_t begin, int64_t end) {
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
        const float* from = g.values + group * n;
        double scale = 0.0;
        if (bad.check(g, group)) {
          float largest = 0.0f;
          for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(from[i]));
          int exponent = 0;
          std::frexp(largest, &exponent);
          scale = std::ldexp(1.0, -exponent);
        }
        float low = 1.0f, high = -1.0f;
        for (int64_t i = 0; i < n; ++i) {
          const float value = scale == 0.0 ? 0.0f : static_cast<float>(static_cast<double>(from[i]) * scale);
          low = std::min(low, value);
          high = std::max(high, value);
          values[i * lanes + lane] = value;
          if (weighted) importance[i * lanes + lane] = g.importance[group * n + i];
        }
        lowest[lane] = low;
        highest[lane] = high;
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
