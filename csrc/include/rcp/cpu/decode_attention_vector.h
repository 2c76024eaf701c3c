// One token's rotary embedding and attention, over sixteen lanes. Included by each_isa.h.

namespace decode {

using namespace lanes16;

// y[k] = x[k] cos[k] + turned[k] sin[k], rounded to the type after each operation. `turned` is x with its halves
// exchanged and its first half then negated.
template <FloatType TYPE>
RCP_TARGET inline void rotate(const void* x, const void* cosine, const void* sine, int64_t dim, void* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i, j = half + i;
    const Lanes low = load_any(x, TYPE, i, n), high = load_any(x, TYPE, j, n);
    const Lanes a = rounded<TYPE>(low * load_any(cosine, TYPE, i, n));
    const Lanes b = rounded<TYPE>((set1(0.0f) - high) * load_any(sine, TYPE, i, n));
    const Lanes c = rounded<TYPE>(high * load_any(cosine, TYPE, j, n));
    const Lanes d = rounded<TYPE>(low * load_any(sine, TYPE, j, n));
    store_any(y, TYPE, i, n, a + b);
    store_any(y, TYPE, j, n, c + d);
  }
}

// scores[t] = scale * (query . key t), -inf from positions() on. Returns the largest score. parts: sixteen registers.
template <FloatType TYPE>
RCP_TARGET inline float score_positions(const DecodeAttention& a, int64_t first, const float* query, float* scores,
                                        float* parts) {
  const float nothing = -std::numeric_limits<float>::infinity();
  Lanes largest = set1(nothing);
  for (int64_t t0 = 0; t0 < a.padded_positions(); t0 += 16) {
    // Four positions at once: a single sum would wait for its last addition.
    for (int64_t t = 0; t < 16; t += 4) {
      Lanes sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
      const int64_t here = first + (t0 + t) * a.dim, left = a.positions() - t0 - t;
      for (int64_t i = 0; i < a.dim; i += 16) {
        const Lanes q = load(query + i);
#pragma GCC unroll 4
        for (int64_t u = 0; u < 4; ++u) {
          if (u >= left) break;
          sum[u] = multiply_add(q, load_any(a.keys, TYPE, here + u * a.dim + i, a.dim - i), sum[u]);
        }
      }
#pragma GCC unroll 4
      for (int64_t u = 0; u < 4; ++u) store(parts + 16 * (t + u), sum[u]);
    }
    store(scores + t0, sums(parts) * set1(a.scale));
    for (int64_t t = a.positions(); t < t0 + 16; ++t) scores[t] = nothing;
    largest = max(load(scores + t0), largest);
  }
  store(parts, largest);
  float top = parts[0];
  for (int t = 1; t < 16; ++t) top = parts[t] > top ? parts[t] : top;
  return top;
}

// out = the sum over positions of weights[t] * value t, divided by the divisor.
template <FloatType TYPE>
RCP_TARGET inline void weigh_values(const DecodeAttention& a, int64_t first, const float* weights, Lanes divisor,
                                    void* out) {
  for (int64_t i = 0; i < a.dim; i += 64) {
    Lanes sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t t = 0; t < a.positions(); ++t) {
      const Lanes weight = set1(weights[t]);
#pragma GCC unroll 4
      for (int64_t u = 0; u < 4; ++u) {
        const int64_t at = i + 16 * u;
        if (at >= a.dim) break;
        sum[u] = multiply_add(weight, load_any(a.values, TYPE, first + t * a.dim + at, a.dim - at), sum[u]);
      }
    }
#pragma GCC unroll 4
    for (int64_t u = 0; u < 4; ++u) {
      const int64_t at = i + 16 * u;
      if (at < a.dim) store_any(out, TYPE, at, a.dim - at, sum[u] / divisor);
    }
  }
}

template <FloatType TYPE>
RCP_TARGET inline void decode_attention(const DecodeAttention& a, int64_t batch, int64_t head, float* work) {
  const int64_t dim = a.dim, width = (a.heads + 2 * a.kv_heads) * dim;
  const void* token = advance(a.qkv, TYPE, batch * width);
  const void* cosine = advance(a.cosine, TYPE, batch * a.cosine_stride);
  const void* sine = advance(a.sine, TYPE, batch * a.sine_stride);
  const int64_t first = (batch * a.kv_heads + head) * a.capacity * dim, last = first + a.length * dim;
  rotate<TYPE>(advance(token, TYPE, (a.heads + head) * dim), cosine, sine, dim, advance(a.keys, TYPE, last));
  std::memcpy(advance(a.values, TYPE, last), advance(token, TYPE, (a.heads + a.kv_heads + head) * dim),
              static_cast<std::size_t>(dim) * float_size(TYPE));

  float* scores = work;
  float* query = scores + a.padded_positions();
  float* parts = query + a.padded_dim();
  for (int64_t g = 0; g < a.queries_a_head(); ++g) {
    const int64_t q = head * a.queries_a_head() + g;
    // Rotated in the type of x, as in memory, then widened.
    rotate<TYPE>(advance(token, TYPE, q * dim), cosine, sine, dim, parts);
    for (int64_t i = 0; i < dim; i += 16) store(query + i, load_any(parts, TYPE, i, dim - i));

    const Lanes top = set1(score_positions<TYPE>(a, first, query, scores, parts));
    Lanes total = set1(0.0f);
    for (int64_t t0 = 0; t0 < a.padded_positions(); t0 += 16) {
      store(scores + t0, exp_lanes(load(scores + t0) - top));
      for (int64_t t = a.positions(); t < t0 + 16; ++t) scores[t] = 0.0f;
      total = total + load(scores + t0);
    }
    weigh_values<TYPE>(a, first, scores, set1(sum_of(total)), advance(a.out, TYPE, (batch * a.heads + q) * dim));
  }
}

}  // namespace decode

inline constexpr ByType<DecodeAttentionKernel> decode_attention_kernels = RCP_BY_TYPE(decode::decode_attention);
