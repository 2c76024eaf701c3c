// The kernel of dequantize. Included by each_isa.h.

// Writes columns [0, n) of one row of one chunk: the value of each code, as `type`, from index `first` of y on.
// `codes` is the chunk's codes, r the row of 16, and values[c] the value of code c.
RCP_TARGET inline void dequantize_row(const uint8_t* codes, int bits, int r, const float* values, int64_t n,
                                      FloatType type, void* y, int64_t first) {
  // A loop of its own for the codes: a load of 16 bytes right after stores of 4 waits for them.
  constexpr int64_t columns = 128;
  alignas(16) uint8_t plain[columns];
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t count = std::min(columns, n - begin);
    for (int64_t k = 0; k < count; k += 32, codes += 64 * bits) detail::codes_of_row(codes, bits, r, plain + k);
    for (int64_t k = 0; k < count; k += 16) {
      lanes16::store_any(y, type, first + begin + k, count - k, lanes16::lookup(values, plain + k));
    }
  }
}
