// The steps before and after lut_linear, over sixteen lanes. Included by each_isa.h. Products and sums are rounded one
// by one, never fused: plain torch operators then give the same bits (rcp_kernels/ops/token_prologue.py).

namespace prologue {

using namespace lanes16;

// Folds the squares, padded to a power of two, in halves until sixteen are left.
template <FloatType TYPE>
RCP_TARGET inline float sum_of_squares(const void* x, int64_t n, float* work) {
  int64_t half = rms_norm_work(n);
  for (int64_t i = 0; i < half; i += 16) {
    const Lanes a = load_any(x, TYPE, i, n - i);
    const Lanes b = half + i < n ? load_any(x, TYPE, half + i, n - half - i) : set1(0.0f);
    store(work + i, a * a + b * b);
  }
  for (half /= 2; half >= 16; half /= 2) {
    for (int64_t i = 0; i < half; i += 16) store(work + i, load(work + i) + load(work + half + i));
  }
  return sum_of(load(work));
}

template <FloatType TYPE>
RCP_TARGET inline void rms_norm(const RmsNorm& norm, const void* x, int64_t n, float* work, void* y) {
  const float mean = sum_of_squares<TYPE>(x, n, work) * (1.0f / static_cast<float>(n));
  const Lanes inverse = set1(1.0f / std::sqrt(mean + norm.epsilon)), offset = set1(norm.offset);
  for (int64_t i = 0; i < n; i += 16) {
    Lanes value = load_any(x, TYPE, i, n - i) * inverse;
    // LLaMA's norm, without an offset, rounds before the gain. Gemma's, with an offset, does not.
    if (norm.offset == 0.0f) value = rounded<TYPE>(value);
    const Lanes gain = load_any(norm.weight, norm.type, i, n - i) + offset;
    store_any(y, TYPE, i, n - i, value * gain);
  }
}

template <FloatType TYPE>
RCP_TARGET inline void gated_activation(GatedActivation activation, const void* x, int64_t n, void* y) {
  const void* up = advance(x, TYPE, n);
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes gate = load_any(x, TYPE, i, n - i);
    Lanes t = gate;
    if (activation == GatedActivation::gelu_tanh) {
      // 0.5 * (1 + tanh(z)) is the logistic function of 2 z.
      t = gate * (gate * gate * set1(0x1.2444f2p-4f) + set1(0x1.988454p+0f));
    }
    const Lanes value = gate / (set1(1.0f) + exp_lanes(set1(0.0f) - t));
    store_any(y, TYPE, i, n - i, rounded<TYPE>(value) * load_any(up, TYPE, i, n - i));
  }
}

template <FloatType TYPE>
RCP_TARGET inline void add_to(const void* x, int64_t n, void* y) {
  for (int64_t i = 0; i < n; i += 16) {
    store_any(y, TYPE, i, n - i, load_any(y, TYPE, i, n - i) + load_any(x, TYPE, i, n - i));
  }
}

}  // namespace prologue

inline constexpr PrologueKernels prologue_kernels{
    RCP_BY_TYPE(prologue::rms_norm), RCP_BY_TYPE(prologue::gated_activation), RCP_BY_TYPE(prologue::add_to)};
