// clip_search of one ISA: as many groups as the ISA has lanes, side by side. Included once per ISA, inside its
// namespace, with the names of lanes_scalar.h in scope and RCP_LANES_TARGET set, because a target attribute cannot
// depend on a template parameter. No include guard.

// The sum of the squared errors of the weights [length][lanes] on the evenly spaced levels between two ends, each times
// its importance where there is one.
template <bool WEIGHTED>
RCP_LANES_TARGET inline lanes::Wide clipped_error(const float* values, const float* importance, int64_t length,
                                                  lanes::Vector low, lanes::Vector high, lanes::Vector last) {
  using namespace lanes;
  const Vector zero = set1(0.0f);
  const Vector step = div(max(sub(high, low), zero), last);
  const Vector inverse = select(greater(step, zero), div(set1(1.0f), step), zero);
  Wide error = wide_zero();
  for (int64_t i = 0; i < length; ++i) {
    const Vector value = load(values + i * lanes::count);
    const Vector code = round_even(min(max(mul(sub(value, low), inverse), zero), last));
    const Wide miss = widen(sub(add(mul(code, step), low), value));
    Wide square = wide_mul(miss, miss);
    if constexpr (WEIGHTED) square = wide_mul(square, widen(load(importance + i * lanes::count)));
    error = wide_add(error, square);
  }
  return error;
}

// Tries every ratio for both ends, then for the low end, then for the high end; writes the best ones of each lane.
template <bool WEIGHTED>
RCP_LANES_TARGET inline void clip_search_tile(const float* values, const float* importance, int64_t length,
                                              const float* lowest, const float* highest, int levels,
                                              const ClipRatios& ratios, float* best_low, float* best_high) {
  using namespace lanes;
  const Vector low = load(lowest), high = load(highest), last = set1(static_cast<float>(levels - 1));
  Vector ratio_low = set1(ratios[0]), ratio_high = ratio_low;
  Wide best = clipped_error<WEIGHTED>(values, importance, length, mul(low, ratio_low), mul(high, ratio_high), last);
  for (int phase = 0; phase < 3; ++phase) {
    const bool moves_low = phase != 2, moves_high = phase != 1;
    const Vector fixed_low = ratio_low, fixed_high = ratio_high;
    for (const float ratio : ratios) {
      const Vector tried = set1(ratio);
      const Vector first = mul(low, moves_low ? tried : fixed_low);
      const Vector end = mul(high, moves_high ? tried : fixed_high);
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
