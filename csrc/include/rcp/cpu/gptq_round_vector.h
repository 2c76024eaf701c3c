// gptq_round of one row in each lane of a register. Included by each_isa.h.

// Rounds columns [0, rounded) of the weights [columns][lanes], one row a lane, and feeds the error of each column back
// to all columns after it. `upper` points to the diagonal entry of the first column; its rows are `stride` apart.
// `bounds` is [levels - 1][lanes], `table` is [levels][lanes].
RCP_TARGET inline void gptq_round_tile(float* weights, int64_t columns, int64_t rounded, const float* upper,
                                       int64_t stride, const float* bounds, const float* table, int levels,
                                       uint8_t* codes, float* errors) {
  using namespace lanes;
  const Vector one = set1(1.0f), zero = set1(0.0f);
  for (int64_t j = 0; j < rounded; ++j) {
    const float* row = upper + j * stride;
    const Vector value = load(weights + j * lanes::count);
    Vector code = zero, nearest = load(table);
    for (int b = 0; b + 1 < levels; ++b) {
      const Mask above = greater(value, load(bounds + b * lanes::count));
      code = code + select(above, one, zero);
      nearest = select(above, load(table + (b + 1) * lanes::count), nearest);
    }
    store_bytes(codes + j * lanes::count, code);
    const Vector error = (value - nearest) * set1(1.0f / row[j]);
    store(errors + j * lanes::count, error);
    for (int64_t k = j + 1; k < columns; ++k) {
      float* at = weights + k * lanes::count;
      store(at, load(at) - error * set1(row[k]));
    }
  }
}

inline constexpr GptqRoundKernel gptq_round_kernel{lanes::count, gptq_round_tile};
