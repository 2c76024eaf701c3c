// How a GEMV launch of lut_linear is cut into blocks. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rcp/cuda/weight_layout.h"

namespace rcp {
namespace cuda {

struct GemvPlan {
  int tiles;   // row tiles a block
  int splits;  // of the columns
  int units_per_split;
};

// The cheapest of a few cuts by a model in cycles of one multiprocessor, whose four schedulers issue a warp instruction
// each per cycle. Instruction counts are those of the compiled kernels (W2, sm_80); they enter 1.5 times, since most
// of them go to the integer pipe, which takes a warp instruction every other cycle.
//
//   issue  blocks on the busiest multiprocessor * 8 warps / 4 * 1.5 * instructions a warp:
//          240 + what quantizing takes + (a warp's units) * tiles * 184
//   memory bytes of the weight / (12 bytes a cycle and multiprocessor: between an RTX 3090's 7 and an A100's 13), and
//          of the activations that every block reads again, from L2, / 36
//   tail   1500 cycles for a reduction over splits: a fence, an atomic and a round trip to L2
//
// cost = max(issue, memory) + tail; among equals, the fewest instructions.
inline GemvPlan plan_gemv(const CudaLayout& layout, int sm_count, bool quantizes, int few_tiles, int many_tiles,
                          int shared_bytes_per_unit, int shared_bytes_per_tile, int fragment_bytes_per_unit) {
  constexpr int warps = 8, shared_limit = 48 * 1024 - 288;  // 288 bytes for what the kernels need besides
  const int units = static_cast<int>(layout.units());
  const double weight = static_cast<double>(layout.total_bytes()) / (12.0 * sm_count);
  GemvPlan best{few_tiles, 1, units};
  double best_cost = 1e300, best_instructions = 1e300;
  for (const int tiles : {few_tiles, many_tiles}) {
    for (int splits = 1; splits <= std::min(units, 64); ++splits) {
      const int per_split = (units + splits - 1) / splits;
      if ((units + per_split - 1) / per_split != splits) continue;  // the last one would be empty
      if (per_split * shared_bytes_per_unit + tiles * shared_bytes_per_tile > shared_limit) continue;
      const double quantize = quantizes ? (units * 1.4 + per_split * 4.5) * unit_columns / (32 * warps) : 0.0;
      const double a_warp = 240 + quantize + (per_split + warps - 1) / warps * tiles * 184.0;
      const int64_t blocks = (layout.row_tiles() + tiles - 1) / tiles * splits;
      const double busiest = static_cast<double>((blocks + sm_count - 1) / sm_count);
      const double issue = busiest * warps / 4 * 1.5 * a_warp;
      const double memory =
          weight + static_cast<double>(blocks) * per_split * fragment_bytes_per_unit / (36.0 * sm_count);
      const double cost = std::max(issue, memory) + (splits > 1 ? 1500.0 : 0.0);
      const double instructions = static_cast<double>(blocks) * a_warp;
      if (cost < best_cost || (cost == best_cost && instructions < best_instructions)) {
        best = {tiles, splits, per_split};
        best_cost = cost;
        best_instructions = instructions;
      }
    }
  }
  return best;
}

}  // namespace cuda
}  // namespace rcp
