// One token's rotary embedding and attention over sixteen lanes. Included once per instruction set, inside its
// namespace, after the Lanes of kv_cache_<isa>.h, the functions of token_prologue_vector.h and RCP_DECODE_TARGET, the
// function target attribute. Each lane sees the same operations in the same order everywhere. No include guard.

// y[k] = x[k] cos[k] + rotated[k] sin[k], rounded to the type after each operation; rotated is x with its halves
// exchanged and the first one negated.
template <FloatType TYPE>
RCP_DECODE_TARGET inline void rotate(const void* x, const void* cosine, const void* sine, int64_t dim, void* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i, j = half + i;
    const Lanes low = load_any(x, TYPE, i, n), high = load_any(x, TYPE, j, n);
    const Lanes a = rounded<TYPE>(mul(low, load_any(cosine, TYPE, i, n)));
    const Lanes b = rounded<TYPE>(mul(sub(set1(0.0f), high), load_any(sine, TYPE, i, n)));
    const Lanes c = rounded<TYPE>(mul(high, load_any(cosine, TYPE, j, n)));
    const Lanes d = rounded<TYPE>(mul(low, load_any(sine, TYPE, j, n)));
    store_any(y, TYPE, i, n, add(a, b));
    store_any(y, TYPE, j, n, add(c, d));
  }
}

// The queries of one head of keys and values. work: scores of all positions, a query, and sixteen registers.
template <FloatType TYPE>
RCP_DECODE_TARGET inline void decode_attention_of(const DecodeAttention& a, int64_t batch, int64_t head, float* work) {
  const int64_t dim = a.dim, groups = a.heads / a.kv_heads, width = (a.heads + 2 * a.kv_heads) * dim;
  const int64_t count = a.length + 1, padded = (count + 15) / 16 * 16, padded_dim = (dim + 15) / 16 * 16;
  const void* token = advance(a.qkv, TYPE, batch * width);
  const void* cosine = advance(a.cosine, TYPE, batch * a.cosine_stride);
  const void* sine = advance(a.sine, TYPE, batch * a.sine_stride);
  const int64_t first = (batch * a.kv_heads + head) * a.capacity * dim, last = first + a.length * dim;
  rotate<TYPE>(advance(token, TYPE, (a.heads + head) * dim), cosine, sine, dim,
               const_cast<void*>(advance(a.keys, TYPE, last)));
  std::memcpy(const_cast<void*>(advance(a.values, TYPE, last)),
              advance(token, TYPE, (a.heads + a.kv_heads + head) * dim),
              static_cast<std::size_t>(dim) * float_size(TYPE));

  float* scores = work;
  float* query = scores + padded;
  float* parts = query + padded_dim;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t q = head * groups + g;
    // Rotated in the type of x, as it would be in memory, then widened.
    rotate<TYPE>(advance(token, TYPE, q * dim), cosine, sine, dim, parts);
    for (int64_t i = 0; i < dim; i += 16) store(query + i, load_any(parts, TYPE, i, dim - i));

    Lanes largest = set1(-std::numeric_limits<float>::infinity());
    for (int64_t t0 = 0; t0 < padded; t0 += 16) {
      // Four positions at once: each of their sums waits for its last addition.
      for (int64_t t = 0; t < 16; t += 4) {
        Lanes sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
        const int64_t here = first + (t0 + t) * dim, left = count - t0 - t;
        for (int64_t i = 0; i < dim; i += 16) {
          const Lanes q_lanes = load(query + i);
#pragma GCC unroll 4
          for (int64_t u = 0; u < 4; ++u) {
            if (u >= left) break;
            sum[u] = multiply_add(q_lanes, load_any(a.keys, TYPE, here + u * dim + i, dim - i), sum[u]);
          }
        }
#pragma GCC unroll 4
        for (int64_t u = 0; u < 4; ++u) store(parts + 16 * (t + u), sum[u]);
      }
      store(scores + t0, mul(sums(parts), set1(a.scale)));
      for (int64_t t = count; t < t0 + 16; ++t) scores[t] = -std::numeric_limits<float>::infinity();
      largest = max(load(scores + t0), largest);
    }
    store(parts, largest);
    float top = parts[0];
    for (int t = 1; t < 16; ++t) top = parts[t] > top ? parts[t] : top;

    Lanes total = set1(0.0f);
    for (int64_t t0 = 0; t0 < padded; t0 += 16) {
      store(scores + t0, exp_lanes(sub(load(scores + t0), set1(top))));
      for (int64_t t = count; t < t0 + 16; ++t) scores[t] = 0.0f;
      total = add(total, load(scores + t0));
    }
    const Lanes divisor = set1(sum_of(total));
    void* out = const_cast<void*>(advance(a.out, TYPE, (batch * a.heads + q) * dim));
    for (int64_t i = 0; i < dim; i += 64) {
      Lanes sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
      for (int64_t t = 0; t < count; ++t) {
        const Lanes weight = set1(scores[t]);
#pragma GCC unroll 4
        for (int64_t u = 0; u < 4; ++u) {
          const int64_t at = i + 16 * u;
          if (at >= dim) break;
          sum[u] = multiply_add(weight, load_any(a.values, TYPE, first + t * dim + at, dim - at), sum[u]);
        }
      }
#pragma GCC unroll 4
      for (int64_t u = 0; u < 4; ++u) {
        const int64_t at = i + 16 * u;
        if (at < dim) store_any(out, TYPE, at, dim - at, div(sum[u], divisor));
      }
    }
  }
}

RCP_DECODE_TARGET inline void decode_attention(const DecodeAttention& a, int64_t batch, int64_t head, float* work) {
  if (a.type == FloatType::float32) return decode_attention_of<FloatType::float32>(a, batch, head, work);
  if (a.type == FloatType::float16) return decode_attention_of<FloatType::float16>(a, batch, head, work);
  decode_attention_of<FloatType::bfloat16>(a, batch, head, work);
}
