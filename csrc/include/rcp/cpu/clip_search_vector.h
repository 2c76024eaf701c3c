// clip_search of one group in each lane of a register. Included by each_isa.h.

// The sum over the weights [length][lanes] of their squared errors on the evenly spaced levels between two ends, each
// times its importance where there is one.
template <bool WEIGHTED>
RCP_TARGET inline lanes::Wide clipped_error(const float* values, const float* importance, int64_t length,
                                            lanes::Vector low, lanes::Vector high, lanes::Vector last) {
  using namespace lanes;
  const Vector zero = set1(0.0f);
  const Vector step = max(high - low, zero) / last;
  const Vector inverse = select(greater(step, zero), set1(1.0f) / step, zero);
  Wide error{};
  for (int64_t i = 0; i < length; ++i) {
    const Vector value = load(values + i * lanes::count);
    const Vector code = round_even(min(max((value - low) * inverse, zero), last));
    const Wide miss = widen(code * step + low - value);
    Wide square = miss * miss;
    if constexpr (WEIGHTED) square = square * widen(load(importance + i * lanes::count));
    error = error + square;
  }
  return error;
}

// Tries every ratio for both ends, then for the low end, then for the high end. Writes the best ratios of each lane.
template <bool WEIGHTED>
RCP_TARGET inline void clip_search_tile(const float* values, const float* importance, int64_t length,
                                        const float* lowest, const float* highest, int levels, const ClipRatios& ratios,
                                        float* best_low, float* best_high) {
  using namespace lanes;
  const Vector low = load(lowest), high = load(highest), last = set1(static_cast<float>(levels - 1));
  Vector ratio_low = set1(ratios[0]), ratio_high = ratio_low;
  Wide best = clipped_error<WEIGHTED>(values, importance, length, low * ratio_low, high * ratio_high, last);
  for (int phase = 0; phase < 3; ++phase) {
    const bool moves_low = phase != 2, moves_high = phase != 1;
    const Vector fixed_low = ratio_low, fixed_high = ratio_high;
    for (const float ratio : ratios) {
      const Vector tried = set1(ratio);
      const Vector first = low * (moves_low ? tried : fixed_low);
      const Vector end = high * (moves_high ? tried : fixed_high);
      const Wide found = clipped_error<WEIGHTED>(values, importance, length, first, end, last);
      const Mask better = wide_less(found, best);
      best = wide_select(better, found, best);
      if (moves_low) ratio_low = select(better, tried, ratio_low);
      if (moves_high) ratio_high = select(better, tried, ratio_high);
    }
  }
  store(best_low, ratio_low);
  store(best_high, ratio_high);
}

template <bool WEIGHTED>
inline constexpr ClipSearchKernel clip_search_kernel{lanes::count, clip_search_tile<WEIGHTED>};
