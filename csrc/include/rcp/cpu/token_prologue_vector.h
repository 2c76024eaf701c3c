// What may happen to a token before lut_linear rotates or quantizes it, and to an output after, over sixteen lanes.
// Included once per instruction set, inside its namespace, after the Lanes of kv_cache_<isa>.h and
// RCP_PROLOGUE_TARGET, the function target attribute. Products and sums are rounded one by one, never fused, so that
// plain torch operators give the same bits (rcp_kernels/ops/token_prologue.py). No include guard.

// a as it comes back from memory of the type.
template <FloatType TYPE>
RCP_PROLOGUE_TARGET RCP_INLINE Lanes rounded(Lanes a) {
  if constexpr (TYPE == FloatType::float32) return a;
  alignas(64) uint16_t raw[16];
  store_any(raw, TYPE, 0, 16, a);
  return load_any(raw, TYPE, 0, 16);
}

// The squares beside the squares half the padded length further, then halves of these until one number is left.
template <FloatType TYPE>
RCP_PROLOGUE_TARGET inline float sum_of_squares(const void* x, int64_t n, float* work) {
  int64_t half = rms_norm_work(n);
  for (int64_t i = 0; i < half; i += 16) {
    const Lanes a = load_any(x, TYPE, i, n - i);
    const Lanes b = half + i < n ? load_any(x, TYPE, half + i, n - half - i) : set1(0.0f);
    store(work + i, add(mul(a, a), mul(b, b)));
  }
  for (half /= 2; half >= 16; half /= 2) {
    for (int64_t i = 0; i < half; i += 16) store(work + i, add(load(work + i), load(work + half + i)));
  }
  return sum_of(load(work));
}

template <FloatType TYPE>
RCP_PROLOGUE_TARGET inline void rms_norm_of(const RmsNorm& norm, const void* x, int64_t n, float* work, void* y) {
  const float mean = sum_of_squares<TYPE>(x, n, work) * (1.0f / static_cast<float>(n));
  const Lanes inverse = set1(1.0f / std::sqrt(mean + norm.epsilon)), offset = set1(norm.offset);
  for (int64_t i = 0; i < n; i += 16) {
    Lanes value = mul(load_any(x, TYPE, i, n - i), inverse);
    // Models without an offset round before the gain, models with one do not.
    if (norm.offset == 0.0f) value = rounded<TYPE>(value);
    const Lanes gain = add(load_any(norm.weight, norm.type, i, n - i), offset);
    store_any(y, TYPE, i, n - i, mul(value, gain));
  }
}

// e^x, below 2 units in the last place: Cephes' polynomial. Infinity from 89 on, e^-87 below -87.
RCP_PROLOGUE_TARGET RCP_INLINE Lanes exp_lanes(Lanes x) {
  x = min(max(x, set1(-87.0f)), set1(89.0f));
  const Lanes n = round_even(mul(x, set1(0x1.715476p+0f)));
  const Lanes r = sub(sub(x, mul(n, set1(0x1.63p-1f))), mul(n, set1(-0x1.bd0106p-13f)));
  Lanes p = set1(1.9875691500e-4f);
  p = add(mul(p, r), set1(1.3981999507e-3f));
  p = add(mul(p, r), set1(8.3334519073e-3f));
  p = add(mul(p, r), set1(4.1665795894e-2f));
  p = add(mul(p, r), set1(1.6666665459e-1f));
  p = add(mul(p, r), set1(5.0000001201e-1f));
  p = add(add(mul(p, mul(r, r)), r), set1(1.0f));
  // n reaches 128, which no float has for an exponent.
  const Lanes half = round_even(mul(n, set1(0.5f)));
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

template <FloatType TYPE>
RCP_PROLOGUE_TARGET inline void gated_activation_of(GatedActivation activation, const void* x, int64_t n, void* y) {
  const void* up = advance(x, TYPE, n);
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes gate = load_any(x, TYPE, i, n - i);
    Lanes t = gate;
    if (activation == GatedActivation::gelu_tanh) {
      // 0.5 * (1 + tanh(z)) is the logistic function of 2 z.
      t = mul(gate, add(mul(mul(gate, gate), set1(0x1.2444f2p-4f)), set1(0x1.988454p+0f)));
    }
    const Lanes value = div(gate, add(set1(1.0f), exp_lanes(sub(set1(0.0f), t))));
    store_any(y, TYPE, i, n - i, mul(rounded<TYPE>(value), load_any(up, TYPE, i, n - i)));
  }
}

template <FloatType TYPE>
RCP_PROLOGUE_TARGET inline void add_to_of(const void* x, int64_t n, void* y) {
  for (int64_t i = 0; i < n; i += 16) {
    store_any(y, TYPE, i, n - i, add(load_any(y, TYPE, i, n - i), load_any(x, TYPE, i, n - i)));
  }
}

RCP_PROLOGUE_TARGET inline void rms_norm(const RmsNorm& norm, const void* x, FloatType type, int64_t n, float* work,
                                         void* y) {
  if (type == FloatType::float32) return rms_norm_of<FloatType::float32>(norm, x, n, work, y);
  if (type == FloatType::float16) return rms_norm_of<FloatType::float16>(norm, x, n, work, y);
  rms_norm_of<FloatType::bfloat16>(norm, x, n, work, y);
}

RCP_PROLOGUE_TARGET inline void gated_activation(GatedActivation activation, const void* x, FloatType type, int64_t n,
                                                 void* y) {
  if (type == FloatType::float32) return gated_activation_of<FloatType::float32>(activation, x, n, y);
  if (type == FloatType::float16) return gated_activation_of<FloatType::float16>(activation, x, n, y);
  gated_activation_of<FloatType::bfloat16>(activation, x, n, y);
}

RCP_PROLOGUE_TARGET inline void add_to(const void* x, FloatType type, int64_t n, void* y) {
  if (type == FloatType::float32) return add_to_of<FloatType::float32>(x, n, y);
  if (type == FloatType::float16) return add_to_of<FloatType::float16>(x, n, y);
  add_to_of<FloatType::bfloat16>(x, n, y);
}
