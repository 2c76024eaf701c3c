// The key-value cache's kernels over sixteen lanes. Included once per instruction set, inside its namespace, after
// Lanes, what can be done with them, and RCP_KV_TARGET, the function target attribute: it cannot depend on a template
// parameter. Each lane sees the same operations in the same order everywhere, so that all agree bit for bit. No include
// guard.

RCP_KV_TARGET inline bool append(const void* x, FloatType type, const KvShape& shape, float clip, uint8_t* codes,
                                 uint16_t* scales) {
  const int64_t n = shape.head_dim;
  // Lanes beyond the vector read as 0, which is in the range anyway.
  Lanes low = set1(0.0f), high = low, wrong = low;
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes value = load_any(x, type, i, n - i);
    low = min(value, low);
    high = max(value, high);
    wrong = multiply_add(value, set1(0.0f), wrong);
  }
  alignas(64) float all[48];
  store(all, low);
  store(all + 16, high);
  store(all + 32, wrong);
  float smallest = 0.0f, largest = 0.0f;
  bool finite = true;
  for (int i = 0; i < 16; ++i) {
    smallest = all[i] < smallest ? all[i] : smallest;
    largest = all[16 + i] > largest ? all[16 + i] : largest;
    finite = finite && all[32 + i] == 0.0f;
  }
  smallest = smallest * clip;
  largest = largest * clip;
  if (!finite || smallest <= -65520.0f || largest >= 65520.0f) return false;
  const uint16_t stored_zero = float_to_half(smallest);
  const float zero = half_to_float(stored_zero);
  const uint16_t stored_scale = float_to_half((largest - zero) / 15.0f);
  const float scale = half_to_float(stored_scale);
  scales[0] = stored_scale;
  scales[1] = stored_zero;
  const Lanes inverse = set1(scale > 0.0f ? 1.0f / scale : 0.0f), offset = set1(zero), top = set1(15.0f);
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    const int64_t i = b * kv_block;
    Lanes q[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Lanes value = load_any(x, type, i + 16 * half, n - i - 16 * half);
      // Integer bounds: clamping before rounding is the same.
      q[half] = round_even(min(max(mul(sub(value, offset), inverse), set1(0.0f)), top));
    }
    Lanes even, odd;
    deinterleave(q[0], q[1], even, odd);
    const int64_t bytes = shape.row_bytes() - b * kv_block / 2;
    if (i + kv_block > n && n % 2) {
      // A missing last code is 0, not the code of the padding's 0.
      store(all, odd);
      all[(n - i) / 2] = 0.0f;
      odd = load(all);
    }
    store_nibbles(codes + b * kv_block / 2, bytes, even, odd);
  }
  return true;
}

RCP_KV_TARGET RCP_INLINE void decode_block(const uint8_t* codes, const KvShape& shape, int64_t b, Lanes& even,
                                           Lanes& odd) {
  const int64_t bytes = shape.row_bytes() - b * kv_block / 2;
  if (bytes >= kv_block / 2) {
    nibbles<true>(codes + b * kv_block / 2, bytes, even, odd);
  } else {
    nibbles<false>(codes + b * kv_block / 2, bytes, even, odd);
  }
}

RCP_KV_TARGET inline void dequantize(const uint8_t* codes, const uint16_t* scales, const KvShape& shape, FloatType type,
                                     void* out) {
  const Lanes scale = set1(half_to_float(scales[0])), zero = set1(half_to_float(scales[1]));
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    Lanes even, odd, first, second;
    decode_block(codes, shape, b, even, odd);
    interleave(multiply_add(scale, even, zero), multiply_add(scale, odd, zero), first, second);
    const int64_t i = b * kv_block, left = shape.head_dim - i;
    store_any(out, type, i, left, first);
    if (left > 16) store_any(out, type, i + 16, left - 16, second);
  }
}

RCP_KV_TARGET RCP_INLINE float sum_of(Lanes a) {
  alignas(64) float x[16];
  store(x, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) x[j] = x[j] + x[j + half];
  }
  return x[0];
}

RCP_KV_TARGET inline bool prepare_query(const void* x, FloatType type, const KvShape& shape, float scale, float* query,
                                        float* sum) {
  Lanes total = set1(0.0f), wrong = total;
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    const int64_t i = b * kv_block, left = shape.head_dim - i;
    const Lanes first = load_any(x, type, i, left);
    const Lanes second = left > 16 ? load_any(x, type, i + 16, left - 16) : set1(0.0f);
    wrong = multiply_add(second, set1(0.0f), multiply_add(first, set1(0.0f), wrong));
    Lanes even, odd;
    deinterleave(mul(first, set1(scale)), mul(second, set1(scale)), even, odd);
    store(query + i, even);
    store(query + i + 16, odd);
    total = add(total, add(even, odd));
  }
  *sum = sum_of(total);
  return sum_of(wrong) == 0.0f;
}

// 2^x for x in [-64, 0], else 0 (x > 0 does not occur); below 1.3 units in the last place.
RCP_KV_TARGET RCP_INLINE Lanes exp2_lanes(Lanes x) {
  const Lanes bounded = max(x, set1(kv_exponent_floor));
  const Lanes n = round_even(bounded), f = sub(bounded, n);
  Lanes p = set1(0x1.41fbb8p-13f);
  p = multiply_add(p, f, set1(0x1.5f3e5ap-10f));
  p = multiply_add(p, f, set1(0x1.3b2d4ep-7f));
  p = multiply_add(p, f, set1(0x1.c6aee8p-5f));
  p = multiply_add(p, f, set1(0x1.ebfbdcp-3f));
  p = multiply_add(p, f, set1(0x1.62e430p-1f));
  p = multiply_add(p, f, set1(1.0f));
  return keep_from(x, kv_exponent_floor, mul(p, power_of_two(n)));
}

// Dot products of sixteen cached vectors (or `count` of them, the others 0) with ROWS query rows, lane by lane.
template <int ROWS, bool FULL>
RCP_KV_TARGET RCP_INLINE void products(const KvShape& shape, const uint8_t* codes, int64_t count, const float* query,
                                       float* parts) {
  const int64_t bytes = shape.row_bytes(), blocks = shape.blocks(), padded = shape.padded();
  for (int64_t t = 0; t < count; ++t) {
    Lanes acc[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) acc[r] = set1(0.0f);
    const uint8_t* row = codes + t * bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      Lanes even, odd;
      if (FULL) {
        nibbles<true>(row + 16 * b, 16, even, odd);
      } else {
        decode_block(row, shape, b, even, odd);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        acc[r] = multiply_add(even, load(query + r * padded + kv_block * b), acc[r]);
        acc[r] = multiply_add(odd, load(query + r * padded + kv_block * b + 16), acc[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) store(parts + (r * 16 + t) * 16, acc[r]);
  }
}

// values += weights * codes over `count` positions, for BLOCKS blocks from the b-th on.
template <int ROWS, int BLOCKS, bool FULL>
RCP_KV_TARGET RCP_INLINE void weigh(const KvShape& shape, const uint8_t* codes, int64_t count, int64_t b,
                                    const float* weights, float* values) {
  const int64_t bytes = shape.row_bytes(), padded = shape.padded();
  Lanes acc[ROWS][2 * BLOCKS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 2 * BLOCKS; ++i) acc[r][i] = set1(0.0f);
  }
  for (int64_t t = 0; t < count; ++t) {
    Lanes code[2 * BLOCKS];
#pragma GCC unroll 2
    for (int i = 0; i < BLOCKS; ++i) {
      if (FULL) {
        nibbles<true>(codes + t * bytes + 16 * (b + i), 16, code[2 * i], code[2 * i + 1]);
      } else {
        decode_block(codes + t * bytes, shape, b + i, code[2 * i], code[2 * i + 1]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Lanes weight = set1(weights[r * kv_chunk + t]);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * BLOCKS; ++i) acc[r][i] = multiply_add(weight, code[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 2 * BLOCKS; ++i) store(values + r * padded + kv_block * b + 16 * i, acc[r][i]);
  }
}

template <int ROWS, bool FULL>
RCP_KV_TARGET inline void chunk_of(const KvShape& shape, const KvRows& rows, int64_t row, const KvHead& keys,
                                   const KvHead& values, int64_t first, int64_t last, const KvPartial& out) {
  const int64_t count = last - first, padded = shape.padded(), bytes = shape.row_bytes();
  const float nothing = -__builtin_inff();
  alignas(64) float parts[ROWS * 16 * 16], scores[ROWS * kv_chunk], value_scale[kv_chunk], value_zero[kv_chunk];
  Lanes largest[ROWS];
  for (int r = 0; r < ROWS; ++r) largest[r] = set1(nothing);
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t here = count - t < 16 ? count - t : 16;
    if (here < 16) std::memset(parts, 0, sizeof parts);
    products<ROWS, FULL>(shape, keys.codes + (first + t) * bytes, here, rows.query + row * padded, parts);
    Lanes scale, zero;
    const uint16_t* key_scales = keys.scales + 2 * (first + t);
    const uint16_t* value_scales = values.scales + 2 * (first + t);
    uint16_t padding[2][32] = {};
    if (here < 16) {
      std::memcpy(padding[0], key_scales, static_cast<std::size_t>(here) * 4);
      std::memcpy(padding[1], value_scales, static_cast<std::size_t>(here) * 4);
      key_scales = padding[0];
      value_scales = padding[1];
    }
    load_scales(key_scales, scale, zero);
    for (int r = 0; r < ROWS; ++r) {
      Lanes score = multiply_add(scale, sums(parts + r * 256), mul(zero, set1(rows.query_sum[row + r])));
      const int64_t begin = rows.begin[row + r], end = rows.end[row + r];
      const uint8_t* mask = rows.mask == nullptr ? nullptr : rows.mask[row + r];
      float* to = scores + r * kv_chunk + t;
      if (mask != nullptr || here < 16 || begin > first + t || end < first + t + 16) {
        store(to, score);
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t at = first + t + i;
          if (i >= here || at < begin || at >= end || (mask != nullptr && !mask[at])) to[i] = nothing;
        }
        score = load(to);
      }
      store(to, score);
      largest[r] = max(score, largest[r]);
    }
    load_scales(value_scales, scale, zero);
    store(value_scale + t, scale);
    store(value_zero + t, zero);
  }
  float offset[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    alignas(64) float lanes[16];
    store(lanes, largest[r]);
    float maximum = nothing;
    for (const float lane : lanes) maximum = lane > maximum ? lane : maximum;
    // A row that may look at nothing here: every score - 0 is -inf, hence every weight 0.
    const Lanes shift = set1(maximum == nothing ? 0.0f : maximum);
    Lanes sum = set1(0.0f), zeros = sum;
    for (int64_t t = 0; t < count; t += 16) {
      const Lanes p = exp2_lanes(sub(load(scores + r * kv_chunk + t), shift));
      sum = add(sum, p);
      zeros = multiply_add(p, load(value_zero + t), zeros);
      store(scores + r * kv_chunk + t, mul(p, load(value_scale + t)));
    }
    out.maximum[row + r] = maximum;
    out.sum[row + r] = sum_of(sum);
    offset[r] = sum_of(zeros);
  }
  float* acc = out.values + row * padded;
  int64_t b = 0;
  for (; b + 2 <= shape.blocks(); b += 2) {
    weigh<ROWS, 2, FULL>(shape, values.codes + first * bytes, count, b, scores, acc);
  }
  if (b < shape.blocks()) weigh<ROWS, 1, FULL>(shape, values.codes + first * bytes, count, b, scores, acc);
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = 0; i < padded; i += 16) {
      store(acc + r * padded + i, add(load(acc + r * padded + i), set1(offset[r])));
    }
  }
}

template <bool FULL>
RCP_KV_TARGET inline void chunk_rows(const KvShape& shape, const KvRows& rows, const KvHead& keys, const KvHead& values,
                                     int64_t first, int64_t last, const KvPartial& out) {
  for (int64_t row = 0; row < rows.rows; row += kv_rows) {
    switch (rows.rows - row) {
      case 1:
        chunk_of<1, FULL>(shape, rows, row, keys, values, first, last, out);
        break;
      case 2:
        chunk_of<2, FULL>(shape, rows, row, keys, values, first, last, out);
        break;
      case 3:
        chunk_of<3, FULL>(shape, rows, row, keys, values, first, last, out);
        break;
      default:
        chunk_of<4, FULL>(shape, rows, row, keys, values, first, last, out);
    }
  }
}

RCP_KV_TARGET inline void chunk(const KvShape& shape, const KvRows& rows, const KvHead& keys, const KvHead& values,
                                int64_t first, int64_t last, const KvPartial& out) {
  if (shape.row_bytes() % 16 == 0) {
    chunk_rows<true>(shape, rows, keys, values, first, last, out);
  } else {
    chunk_rows<false>(shape, rows, keys, values, first, last, out);
  }
}

RCP_KV_TARGET inline void combine(const KvShape& shape, const float* maximum, const float* sum, const float* values,
                                  int64_t chunks, int64_t stride, FloatType type, void* out) {
  float largest = -__builtin_inff();
  for (int64_t c = 0; c < chunks; ++c) largest = maximum[c * stride] > largest ? maximum[c * stride] : largest;
  const bool nothing = largest == -__builtin_inff();
  const Lanes shift = set1(nothing ? 0.0f : largest);
  Lanes total = set1(0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    const Lanes weight = exp2_lanes(sub(set1(maximum[c * stride]), shift));
    total = multiply_add(weight, set1(sum[c * stride]), total);
  }
  if (nothing) total = set1(1.0f);
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    Lanes even = set1(0.0f), odd = even, first, second;
    for (int64_t c = 0; c < chunks; ++c) {
      const Lanes weight = exp2_lanes(sub(set1(maximum[c * stride]), shift));
      even = multiply_add(weight, load(values + c * stride + kv_block * b), even);
      odd = multiply_add(weight, load(values + c * stride + kv_block * b + 16), odd);
    }
    interleave(div(even, total), div(odd, total), first, second);
    const int64_t i = b * kv_block, left = shape.head_dim - i;
    store_any(out, type, i, left, first);
    if (left > 16) store_any(out, type, i + 16, left - 16, second);
  }
}

inline constexpr KvKernels kernels{append, dequantize, prepare_query, chunk, combine};
