// The kernel of nearest_codes. Included by each_isa.h.

// For each of n weights, the number of the `count` ascending bounds that lie below it.
RCP_TARGET inline void codes_of(const float* weights, int64_t n, const float* bounds, int count, uint8_t* codes) {
  using namespace lanes;
  const Vector one = set1(1.0f), zero = set1(0.0f);
  int64_t i = 0;
  for (; i + lanes::count <= n; i += lanes::count) {
    const Vector value = load(weights + i);
    Vector code = zero;
    for (int b = 0; b < count; ++b) code = code + select(greater(value, set1(bounds[b])), one, zero);
    store_bytes(codes + i, code);
  }
  for (; i < n; ++i) {
    int code = 0;
    for (int b = 0; b < count; ++b) code += weights[i] > bounds[b];
    codes[i] = static_cast<uint8_t>(code);
  }
}
