// The Walsh-Hadamard butterflies of AVX2 and AVX-512. Included inside the namespace of each (see each_isa.h), after
//
//   the names of lanes_<isa>.h, and log2 of its lanes, lane_bits
//   swap_lanes<B>                   exchanges lanes whose index differs in bit B
//   merge<B, SET>(keep, other)      keep, but lanes whose bit B is SET from swap_lanes<B>(other)
//   butterfly_lanes<B>              (a + b, a - b) of lanes that differ in bit B
//   permute_lanes

// Stages of register bits [0, BITS): register r meets register r ^ 2^b.
template <int BITS>
RCP_TARGET RCP_INLINE void butterfly_registers(Vector x[1 << BITS]) {
#pragma GCC unroll 4
  for (int b = 0; b < BITS; ++b) {
#pragma GCC unroll 16
    for (int r = 0; r < (1 << BITS); ++r) {
      if (r & (1 << b)) continue;
      const Vector low = x[r], high = x[r | (1 << b)];
      x[r] = low + high;
      x[r | (1 << b)] = low - high;
    }
  }
}

// Stages of the lane bits [0, BITS).
template <int BITS>
RCP_TARGET RCP_INLINE Vector butterfly_all_lanes(Vector x) {
  if constexpr (BITS > 0) x = butterfly_lanes<0>(x);
  if constexpr (BITS > 1) x = butterfly_lanes<1>(x);
  if constexpr (BITS > 2) x = butterfly_lanes<2>(x);
  if constexpr (BITS > 3) x = butterfly_lanes<3>(x);
  return x;
}

// Exchanges register bit b with lane bit b for all b in [0, BITS): a transpose, one instruction per register and bit.
template <int B, int BITS>
RCP_TARGET RCP_INLINE void exchange_bit(Vector x[1 << BITS]) {
#pragma GCC unroll 16
  for (int r = 0; r < (1 << BITS); ++r) {
    if (r & (1 << B)) continue;
    const Vector low = x[r], high = x[r | (1 << B)];
    x[r] = merge<B, true>(low, high);
    x[r | (1 << B)] = merge<B, false>(high, low);
  }
}
template <int BITS>
RCP_TARGET RCP_INLINE void exchange(Vector x[1 << BITS]) {
  if constexpr (BITS > 0) exchange_bit<0, BITS>(x);
  if constexpr (BITS > 1) exchange_bit<1, BITS>(x);
  if constexpr (BITS > 2) exchange_bit<2, BITS>(x);
  if constexpr (BITS > 3) exchange_bit<3, BITS>(x);
}

// The first pass: lane bits, then REGISTERS register bits, over contiguous runs, from the input to float32 scratch. It
// prefetches the next block's input, and the output's lines: the last pass writes them in an order that no hardware
// prefetcher follows. 512 blocks of 16384 on a Zen 5 server: 3.4 ms with the prefetch, 5.2 ms without.
template <FloatType TYPE, int REGISTERS>
RCP_TARGET inline void first_pass(const void* x, const void* y, float* scratch, int64_t n) {
  constexpr int64_t lanes = int64_t{1} << lane_bits;
  constexpr int64_t bytes = (TYPE == FloatType::float32 ? 4 : 2) * lanes;
  for (int64_t at = 0; at < n; at += lanes << REGISTERS) {
    Vector v[1 << REGISTERS];
#pragma GCC unroll 16
    for (int r = 0; r < (1 << REGISTERS); ++r) {
      const int64_t line = (at / lanes + r) * bytes;
      __builtin_prefetch(static_cast<const char*>(y) + line, 1);
      __builtin_prefetch(static_cast<const char*>(x) + n / lanes * bytes + line);
      v[r] = butterfly_all_lanes<lane_bits>(load<TYPE>(x, at + r * lanes));
    }
    butterfly_registers<REGISTERS>(v);
#pragma GCC unroll 16
    for (int r = 0; r < (1 << REGISTERS); ++r) store<FloatType::float32>(scratch, at + r * lanes, v[r]);
  }
}

// A middle pass: REGISTERS index bits from `stride` upwards, in place.
template <int REGISTERS>
RCP_TARGET inline void middle_pass(float* scratch, int64_t n, int64_t stride) {
  constexpr int64_t lanes = int64_t{1} << lane_bits;
  for (int64_t outer = 0; outer < n; outer += stride << REGISTERS) {
    for (int64_t at = outer; at < outer + stride; at += lanes) {
      Vector v[1 << REGISTERS];
#pragma GCC unroll 16
      for (int r = 0; r < (1 << REGISTERS); ++r) v[r] = load<FloatType::float32>(scratch, at + r * stride);
      butterfly_registers<REGISTERS>(v);
#pragma GCC unroll 16
      for (int r = 0; r < (1 << REGISTERS); ++r) store<FloatType::float32>(scratch, at + r * stride, v[r]);
    }
  }
}

// The last pass: the top TOP index bits, the scale, the output type and the order. `source` is the scratch, or with
// WITH_LANES the input: then no register bits come before, and this pass does the lane bits as well.
template <FloatType FROM, FloatType TO, int TOP, bool WITH_LANES>
RCP_TARGET inline void last_pass(const void* source, void* y, int64_t n, float scale, const SequencyPlan* plan) {
  constexpr int64_t lanes = int64_t{1} << lane_bits;
  const int64_t stride = n >> TOP;
  const Vector factor = set1(scale);
  for (int64_t c = 0; c < stride / lanes; ++c) {
    Vector v[1 << TOP];
#pragma GCC unroll 16
    for (int r = 0; r < (1 << TOP); ++r) {
      v[r] = load<FROM>(source, r * stride + c * lanes);
      if constexpr (WITH_LANES) v[r] = butterfly_all_lanes<lane_bits>(v[r]);
    }
    butterfly_registers<TOP>(v);
    if (plan == nullptr) {
#pragma GCC unroll 16
      for (int r = 0; r < (1 << TOP); ++r) store<TO>(y, r * stride + c * lanes, v[r] * factor);
      continue;
    }
    exchange<TOP>(v);
    const uint32_t* place = plan->place.data() + (c << TOP);
#pragma GCC unroll 16
    for (int r = 0; r < (1 << TOP); ++r) {
      const Vector ordered = permute_lanes(v[r], plan->order[place[r] & 1]);
      store<TO>(y, place[r] & ~uint32_t{1}, ordered * factor);
    }
  }
}

// Blocks of at most one register, which holds whole blocks. `count` elements in all; the last register may be partial.
template <FloatType TYPE, int BITS>
RCP_TARGET RCP_INLINE void small_register(const void* x, void* y, int64_t at, float scale, const SequencyPlan* plan) {
  Vector v = butterfly_all_lanes<BITS>(load<TYPE>(x, at));
  if (plan != nullptr) v = permute_lanes(v, plan->order[0]);
  store<TYPE>(y, at, v * set1(scale));
}
template <FloatType TYPE, int BITS>
RCP_TARGET inline void small_blocks(const void* x, void* y, int64_t count, float scale, const SequencyPlan* plan) {
  constexpr int64_t lanes = int64_t{1} << lane_bits;
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) small_register<TYPE, BITS>(x, y, at, scale, plan);
  if (at == count) return;
  alignas(64) unsigned char tail[64] = {};
  const std::size_t bytes = static_cast<std::size_t>(count - at) * float_size(TYPE);
  std::memcpy(tail, advance(x, TYPE, at), bytes);
  small_register<TYPE, BITS>(tail, tail, 0, scale, plan);
  std::memcpy(advance(y, TYPE, at), tail, bytes);
}

template <FloatType TYPE, int TOP>
RCP_TARGET inline void one_block(const void* x, void* y, int bits, float scale, const SequencyPlan* plan,
                                 float* scratch) {
  const int64_t n = int64_t{1} << bits;
  if (bits == lane_bits + TOP) {
    last_pass<TYPE, TYPE, TOP, true>(x, y, n, scale, plan);
    return;
  }
  // Here TOP is lane_bits. The passes before the last do up to lane_bits register bits each.
  static constexpr decltype(&first_pass<TYPE, 1>) first_passes[] = {first_pass<TYPE, 1>, first_pass<TYPE, 2>,
                                                                    first_pass<TYPE, 3>, first_pass<TYPE, lane_bits>};
  static constexpr decltype(&middle_pass<1>) middle_passes[] = {middle_pass<1>, middle_pass<2>, middle_pass<3>,
                                                                middle_pass<lane_bits>};
  const int before_last = bits - TOP, first = std::min(before_last, 2 * lane_bits) - lane_bits;
  first_passes[first - 1](x, y, scratch, n);
  for (int done = lane_bits + first; done < before_last;) {
    const int next = std::min(before_last - done, lane_bits);
    middle_passes[next - 1](scratch, n, int64_t{1} << done);
    done += next;
  }
  last_pass<FloatType::float32, TYPE, TOP, false>(scratch, y, n, scale, plan);
}

// `blocks` contiguous blocks of 2^bits numbers; y may be x. `scratch` holds one block.
template <FloatType TYPE>
RCP_TARGET inline void walsh_blocks(const void* x, void* y, int64_t blocks, int bits, float scale, bool sequency,
                                    float* scratch) {
  const SequencyPlan* plan = sequency ? &sequency_plan<lane_bits>(bits) : nullptr;
  const int64_t n = int64_t{1} << bits;
  if (bits <= lane_bits) {
    static constexpr decltype(&small_blocks<TYPE, 0>) for_bits[] = {small_blocks<TYPE, 0>, small_blocks<TYPE, 1>,
                                                                    small_blocks<TYPE, 2>, small_blocks<TYPE, 3>,
                                                                    small_blocks<TYPE, lane_bits>};
    return for_bits[bits](x, y, blocks * n, scale, plan);
  }
  static constexpr decltype(&one_block<TYPE, 1>) for_top[] = {one_block<TYPE, 1>, one_block<TYPE, 2>,
                                                              one_block<TYPE, 3>, one_block<TYPE, lane_bits>};
  const auto kernel = for_top[std::min(bits - lane_bits, lane_bits) - 1];
  for (int64_t block = 0; block < blocks; ++block) {
    kernel(advance(x, TYPE, block * n), advance(y, TYPE, block * n), bits, scale, plan, scratch);
  }
}

// ROWS rows of out = H x, one register of columns at a time, summed over ascending j. A product with +-1 is exact, so
// the fused sum rounds as the scalar path's plain sum does.
template <int ROWS>
RCP_TARGET inline void base_rows(const float* signs, int64_t row_step, int64_t sum_step, int64_t m, const float* x,
                                 float* out, int64_t columns) {
  for (int64_t c = 0; c < columns; c += int64_t{1} << lane_bits) {
    Vector sum[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[r] = set1(0.0f);
    for (int64_t j = 0; j < m; ++j) {
      const Vector from = load<FloatType::float32>(x, j * columns + c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r] = multiply_add(set1(signs[r * row_step + j * sum_step]), from, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) store<FloatType::float32>(out, r * columns + c, sum[r]);
  }
}

// out[i, :] = sum_j H[i, j] x[j, :] for i, j < m; entry (i, j) of H lies at i * row_step + j * sum_step. columns is a
// multiple of the lanes.
RCP_TARGET inline void multiply_base(const float* base, int64_t row_step, int64_t sum_step, int64_t m, const float* x,
                                     float* out, int64_t columns) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) base_rows<4>(base + i * row_step, row_step, sum_step, m, x, out + i * columns, columns);
  for (; i < m; ++i) base_rows<1>(base + i * row_step, row_step, sum_step, m, x, out + i * columns, columns);
}

inline constexpr WalshKernels kernels = RCP_BY_TYPE(walsh_blocks);
