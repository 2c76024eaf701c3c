// The kernels of the key-value cache, over sixteen lanes. Included by each_isa.h.

namespace kv {

using namespace lanes16;

RCP_TARGET inline bool append(const void* x, FloatType type, const KvShape& shape, float clip, uint8_t* codes,
                              uint16_t* scales) {
  const int64_t n = shape.head_dim;
  // Lanes beyond the vector are 0, which the range always includes.
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
      // With integer bounds, clamping before rounding gives the same as after.
      q[half] = round_even(min(max((value - offset) * inverse, set1(0.0f)), top));
    }
    Lanes even, odd;
    deinterleave(q[0], q[1], even, odd);
    const int64_t bytes = shape.row_bytes() - b * kv_block / 2;
    if (i + kv_block > n && n % 2) {
      // The missing last code must be 0, not the code of the number 0.
      store(all, odd);
      all[(n - i) / 2] = 0.0f;
      odd = load(all);
    }
    store_nibbles(codes + b * kv_block / 2, bytes, even, odd);
  }
  return true;
}

RCP_TARGET RCP_INLINE void decode_block(const uint8_t* codes, const KvShape& shape, int64_t b, Lanes& even,
                                        Lanes& odd) {
  const int64_t bytes = shape.row_bytes() - b * kv_block / 2;
  if (bytes >= kv_block / 2) {
    nibbles<true>(codes + b * kv_block / 2, bytes, even, odd);
  } else {
    nibbles<false>(codes + b * kv_block / 2, bytes, even, odd);
  }
}

RCP_TARGET inline void dequantize(const uint8_t* codes, const uint16_t* scales, const KvShape& shape, FloatType type,
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

RCP_TARGET inline bool prepare_query(const void* x, FloatType type, const KvShape& shape, float scale, float* query,
                                     float* sum) {
  Lanes total = set1(0.0f), wrong = total;
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    const int64_t i = b * kv_block, left = shape.head_dim - i;
    const Lanes first = load_any(x, type, i, left);
    const Lanes second = left > 16 ? load_any(x, type, i + 16, left - 16) : set1(0.0f);
    wrong = multiply_add(second, set1(0.0f), multiply_add(first, set1(0.0f), wrong));
    Lanes even, odd;
    deinterleave(first * set1(scale), second * set1(scale), even, odd);
    store(query + i, even);
    store(query + i + 16, odd);
    total = total + (even + odd);
  }
  *sum = sum_of(total);
  return sum_of(wrong) == 0.0f;
}

// 2^x for x in [-64, 0]; 0 for x < -64. The caller guarantees x <= 0. The error is below 1.3 units in the last place.
RCP_TARGET RCP_INLINE Lanes exp2_lanes(Lanes x) {
  const Lanes bounded = max(x, set1(kv_exponent_floor));
  const Lanes n = round_even(bounded), f = bounded - n;
  Lanes p = set1(0x1.41fbb8p-13f);
  p = multiply_add(p, f, set1(0x1.5f3e5ap-10f));
  p = multiply_add(p, f, set1(0x1.3b2d4ep-7f));
  p = multiply_add(p, f, set1(0x1.c6aee8p-5f));
  p = multiply_add(p, f, set1(0x1.ebfbdcp-3f));
  p = multiply_add(p, f, set1(0x1.62e430p-1f));
  p = multiply_add(p, f, set1(1.0f));
  return keep_from(x, kv_exponent_floor, p * power_of_two(n));
}

// Products of `count` (at most sixteen) cached vectors with ROWS query rows, summed lane by lane:
// parts [ROWS][16][lanes].
template <int ROWS, bool FULL>
RCP_TARGET RCP_INLINE void products(const KvShape& shape, const uint8_t* codes, int64_t count, const float* query,
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

// values = the sum of weights * codes over `count` positions, for BLOCKS blocks from block b on.
template <int ROWS, int BLOCKS, bool FULL>
RCP_TARGET RCP_INLINE void weigh(const KvShape& shape, const uint8_t* codes, int64_t count, int64_t b,
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

// The scales and zero-points of positions [t, t + here), at most sixteen. Other lanes are 0.
RCP_TARGET RCP_INLINE void load_scales(const KvHead& head, int64_t t, int64_t here, Lanes& scale, Lanes& zero) {
  uint16_t copy[32] = {};
  if (here < 16) std::memcpy(copy, head.scales + 2 * t, static_cast<std::size_t>(here) * 4);
  lanes16::load_scales(here < 16 ? copy : head.scales + 2 * t, scale, zero);
}

// Stores the scores of positions [t, t + here), at most sixteen, to `to`. A position that the row may not attend to
// gets -inf. Returns the stored scores.
RCP_TARGET RCP_INLINE Lanes store_scores(const KvRows& rows, int64_t row, int64_t t, int64_t here, Lanes score,
                                         float* to) {
  store(to, score);
  const int64_t begin = rows.begin[row], end = rows.end[row];
  const uint8_t* mask = rows.mask == nullptr ? nullptr : rows.mask[row];
  if (mask == nullptr && here == 16 && begin <= t && end >= t + 16) return score;
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t at = t + i;
    if (i >= here || at < begin || at >= end || (mask != nullptr && !mask[at])) to[i] = -__builtin_inff();
  }
  return load(to);
}

// Turns the scores [count] of a row into weights times `value_scale`. Writes the row's maximum score and its sum of
// weights; returns the sum of weights * value_zero. `largest` holds the maximum of each lane.
RCP_TARGET RCP_INLINE float weigh_scores(float* scores, int64_t count, Lanes largest, const float* value_scale,
                                         const float* value_zero, float* row_maximum, float* row_sum) {
  alignas(64) float lanes[16];
  store(lanes, largest);
  float maximum = -__builtin_inff();
  for (const float lane : lanes) maximum = lane > maximum ? lane : maximum;
  // A row that attends to nothing here has only scores of -inf: with a shift of 0, all its weights are 0.
  const Lanes shift = set1(maximum == -__builtin_inff() ? 0.0f : maximum);
  Lanes sum = set1(0.0f), zeros = sum;
  for (int64_t t = 0; t < count; t += 16) {
    const Lanes p = exp2_lanes(load(scores + t) - shift);
    sum = sum + p;
    zeros = multiply_add(p, load(value_zero + t), zeros);
    store(scores + t, p * load(value_scale + t));
  }
  *row_maximum = maximum;
  *row_sum = sum_of(sum);
  return sum_of(zeros);
}

template <int ROWS, bool FULL>
RCP_TARGET inline void chunk_of(const KvShape& shape, const KvRows& rows, int64_t row, const KvHead& keys,
                                const KvHead& values, int64_t first, int64_t last, const KvPartial& out) {
  const int64_t count = last - first, padded = shape.padded(), bytes = shape.row_bytes();
  alignas(64) float parts[ROWS * 16 * 16], scores[ROWS * kv_chunk], value_scale[kv_chunk], value_zero[kv_chunk];
  Lanes largest[ROWS];
  for (int r = 0; r < ROWS; ++r) largest[r] = set1(-__builtin_inff());
  for (int64_t t = 0; t < count; t += 16) {
    const int64_t here = count - t < 16 ? count - t : 16;
    if (here < 16) std::memset(parts, 0, sizeof parts);
    products<ROWS, FULL>(shape, keys.codes + (first + t) * bytes, here, rows.query + row * padded, parts);
    Lanes scale, zero;
    load_scales(keys, first + t, here, scale, zero);
    for (int r = 0; r < ROWS; ++r) {
      const Lanes score = multiply_add(scale, sums(parts + r * 256), zero * set1(rows.query_sum[row + r]));
      largest[r] = max(store_scores(rows, row + r, first + t, here, score, scores + r * kv_chunk + t), largest[r]);
    }
    load_scales(values, first + t, here, scale, zero);
    store(value_scale + t, scale);
    store(value_zero + t, zero);
  }
  float offset[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    offset[r] = weigh_scores(scores + r * kv_chunk, count, largest[r], value_scale, value_zero, out.maximum + row + r,
                             out.sum + row + r);
  }
  float* acc = out.values + row * padded;
  int64_t b = 0;
  for (; b + 2 <= shape.blocks(); b += 2) {
    weigh<ROWS, 2, FULL>(shape, values.codes + first * bytes, count, b, scores, acc);
  }
  if (b < shape.blocks()) weigh<ROWS, 1, FULL>(shape, values.codes + first * bytes, count, b, scores, acc);
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = 0; i < padded; i += 16) {
      store(acc + r * padded + i, load(acc + r * padded + i) + set1(offset[r]));
    }
  }
}

template <bool FULL>
RCP_TARGET inline void chunk_rows(const KvShape& shape, const KvRows& rows, const KvHead& keys, const KvHead& values,
                                  int64_t first, int64_t last, const KvPartial& out) {
  static constexpr decltype(&chunk_of<1, FULL>) for_rows[] = {chunk_of<1, FULL>, chunk_of<2, FULL>, chunk_of<3, FULL>,
                                                              chunk_of<4, FULL>};
  for (int64_t row = 0; row < rows.rows; row += kv_rows) {
    const int64_t here = rows.rows - row < kv_rows ? rows.rows - row : kv_rows;
    for_rows[here - 1](shape, rows, row, keys, values, first, last, out);
  }
}

RCP_TARGET inline void chunk(const KvShape& shape, const KvRows& rows, const KvHead& keys, const KvHead& values,
                             int64_t first, int64_t last, const KvPartial& out) {
  if (shape.row_bytes() % 16 == 0) {
    chunk_rows<true>(shape, rows, keys, values, first, last, out);
  } else {
    chunk_rows<false>(shape, rows, keys, values, first, last, out);
  }
}

RCP_TARGET inline void combine(const KvShape& shape, const float* maximum, const float* sum, const float* values,
                               int64_t chunks, int64_t stride, FloatType type, void* out) {
  float largest = -__builtin_inff();
  for (int64_t c = 0; c < chunks; ++c) largest = maximum[c * stride] > largest ? maximum[c * stride] : largest;
  const bool nothing = largest == -__builtin_inff();
  const Lanes shift = set1(nothing ? 0.0f : largest);
  Lanes total = set1(0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    const Lanes weight = exp2_lanes(set1(maximum[c * stride]) - shift);
    total = multiply_add(weight, set1(sum[c * stride]), total);
  }
  if (nothing) total = set1(1.0f);
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    Lanes even = set1(0.0f), odd = even, first, second;
    for (int64_t c = 0; c < chunks; ++c) {
      const Lanes weight = exp2_lanes(set1(maximum[c * stride]) - shift);
      even = multiply_add(weight, load(values + c * stride + kv_block * b), even);
      odd = multiply_add(weight, load(values + c * stride + kv_block * b + 16), odd);
    }
    interleave(even / total, odd / total, first, second);
    const int64_t i = b * kv_block, left = shape.head_dim - i;
    store_any(out, type, i, left, first);
    if (left > 16) store_any(out, type, i + 16, left - 16, second);
  }
}

}  // namespace kv

inline constexpr KvKernels kv_kernels{kv::append, kv::dequantize, kv::prepare_query, kv::chunk, kv::combine};
