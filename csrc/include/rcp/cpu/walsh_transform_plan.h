// The order of a transform's outputs, in the form that the vector kernels use.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "rcp/float_types.h"

namespace rcp {

// `blocks` contiguous blocks of 2^bits numbers, by the type of x and y; y may be x. `scratch` holds one block.
using WalshKernels =
    ByType<void(const void* x, void* y, int64_t blocks, int bits, float scale, bool sequency, float* scratch)>;

// Output s of the sequency order is output i of the natural order, where s = inverse Gray code of bit-reversed i.
inline uint32_t sequency_of(uint32_t i, int bits) {
  uint32_t s = 0;
  for (int b = 0; b < bits; ++b) s |= ((i >> b) & 1u) << (bits - 1 - b);
  for (int shift = 1; shift < bits; shift *= 2) s ^= s >> shift;
  return s;
}

inline constexpr int max_walsh_bits = 15;  // 32768

// The sequency order of 2^bits points in registers of 2^lane_bits lanes. After the last pass of the butterflies and its
// transpose, register r of column c holds outputs that are neighbours in sequency order. Their lanes are in one of two
// orders. So the permutation is a lane shuffle and an address: it needs no gather and no second pass.
struct SequencyPlan {
  std::array<std::array<int32_t, 16>, 2> order;  // the lane that belongs at each position
  std::vector<uint32_t> place;  // [c][r]: first output, a multiple of 2^lane_bits, plus 0 or 1: the order

  SequencyPlan(int bits, int lane_bits) {
    const uint32_t lanes = 1u << lane_bits;
    order = {};
    if (bits <= lane_bits) {  // a register holds whole blocks
      for (uint32_t lane = 0; lane < lanes; ++lane) {
        const uint32_t i = lane & ((1u << bits) - 1);
        order[0][(lane - i) + sequency_of(i, bits)] = static_cast<int32_t>(lane);
      }
      return;
    }
    const int top = bits - lane_bits < lane_bits ? bits - lane_bits : lane_bits;
    const uint32_t registers = 1u << top, columns = 1u << (bits - top - lane_bits);
    for (uint32_t c = 0; c < columns; ++c) {
      for (uint32_t r = 0; r < registers; ++r) {
        std::array<int32_t, 16> lane_at{};
        uint32_t first = 0;
        for (uint32_t lane = 0; lane < lanes; ++lane) {
          // The transpose has put the top index bits into the low lane bits and the low lane bits into r.
          const uint32_t high = lane & (registers - 1), low = (lane >> top << top) | r;
          const uint32_t s = sequency_of((high << (bits - top)) | (c << lane_bits) | low, bits);
          lane_at[s & (lanes - 1)] = static_cast<int32_t>(lane);
          first = s & ~(lanes - 1);
        }
        if (place.empty()) order[0] = order[1] = lane_at;
        const uint32_t which = lane_at == order[0] ? 0 : 1;
        if (which == 1) order[1] = lane_at;
        place.push_back(first | which);
      }
    }
  }
};

// Made once for each size and kept.
template <int LANE_BITS>
const SequencyPlan& sequency_plan(int bits) {
  static std::array<std::once_flag, max_walsh_bits + 1> built;
  static std::array<std::unique_ptr<SequencyPlan>, max_walsh_bits + 1> plans;
  const std::size_t at = static_cast<std::size_t>(bits);
  std::call_once(built[at], [&] { plans[at] = std::make_unique<SequencyPlan>(bits, LANE_BITS); });
  return *plans[at];
}

}  // namespace rcp
