// Functions of sixteen lanes that are built from the others. Included by each_isa.h.

namespace lanes16 {

// Lanes (j, j + 8), then (j, j + 4), (j, j + 2), (j, j + 1).
RCP_TARGET RCP_INLINE float sum_of(Lanes a) {
  alignas(64) float x[16];
  store(x, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) x[j] = x[j] + x[j + half];
  }
  return x[0];
}

// `a` rounded to the type.
template <FloatType TYPE>
RCP_TARGET RCP_INLINE Lanes rounded(Lanes a) {
  if constexpr (TYPE == FloatType::float32) return a;
  alignas(64) uint16_t raw[16];
  store_any(raw, TYPE, 0, 16, a);
  return load_any(raw, TYPE, 0, 16);
}

// e^x with an error below 2 units in the last place (Cephes' polynomial). Infinity from 89 on, e^-87 below -87.
RCP_TARGET RCP_INLINE Lanes exp_lanes(Lanes x) {
  x = min(max(x, set1(-87.0f)), set1(89.0f));
  const Lanes n = round_even(x * set1(0x1.715476p+0f));
  const Lanes r = x - n * set1(0x1.63p-1f) - n * set1(-0x1.bd0106p-13f);
  Lanes p = set1(1.9875691500e-4f);
  p = p * r + set1(1.3981999507e-3f);
  p = p * r + set1(8.3334519073e-3f);
  p = p * r + set1(4.1665795894e-2f);
  p = p * r + set1(1.6666665459e-1f);
  p = p * r + set1(5.0000001201e-1f);
  p = p * (r * r) + r + set1(1.0f);
  // n reaches 128, but the largest exponent of a float is 127.
  const Lanes half = round_even(n * set1(0.5f));
  return p * power_of_two(half) * power_of_two(n - half);
}

}  // namespace lanes16
