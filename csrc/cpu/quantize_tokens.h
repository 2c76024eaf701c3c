// What quantize_activation and walsh_quantize share.
#pragma once

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "binding.h"
#include "binding/quantize_activation.h"
#include "rcp/cpu/walsh_transform.h"

namespace rcp::binding {

// Quantizes every token of the contiguous x, after transforming it where `walsh` is given. The transformed token is
// rounded to the type of x, as if the two ops had run one after the other, but never leaves the cache.
inline std::tuple<Tensor, Tensor> quantize_tokens(const std::string& op, const Tensor& x, FloatType type, int bits,
                                                  float clip, bool packed, const WalshTransform* walsh) {
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t tokens = columns > 0 ? x.numel() / columns : 0;
  const int64_t width = packed ? (columns + 1) / 2 : columns;
  Tensor q = empty(with_last(x, width), packed ? ScalarType::Byte : ScalarType::Char);
  std::vector<int64_t> lead = with_last(x, 1);
  lead.pop_back();
  Tensor scales = empty(lead, ScalarType::Float);
  float* scale_out = static_cast<float*>(scales.mutable_data_ptr());
  if (columns == 0) {
    std::fill_n(scale_out, scales.numel(), 0.0f);
    return {q, scales};
  }
  const void* data = x.const_data_ptr();
  uint8_t* out = static_cast<uint8_t*>(q.mutable_data_ptr());
  const Isa isa = current_isa();
  const QuantizeKernels kernels = quantize_kernels(isa);
  const float qmax = quantization_maximum(bits);
  std::atomic<int64_t> bad_token{std::numeric_limits<int64_t>::max()};
  ThreadPool pool = torch_pool();
  // A thread is worth waking for about 64k elements (10 us).
  if (tokens * columns < (1 << 16)) pool.threads = 1;
  parallel_pieces(pool, tokens, std::max<int64_t>(1, (1 << 14) / columns), [&](int64_t begin, int64_t end) {
    const int64_t row_bytes = walsh ? columns * static_cast<int64_t>(float_size(type)) : 0;
    const int64_t work = walsh ? walsh->scratch_floats() : 0;
    Scratch scratch(Scratch::size_of<int8_t>(columns) + Scratch::size_of<char>(row_bytes) +
                    Scratch::size_of<float>(work));
    int8_t* plain = scratch.take<int8_t>(columns);
    char* transformed = scratch.take<char>(row_bytes);
    float* walsh_work = scratch.take<float>(work);
    for (int64_t m = begin; m < end; ++m) {
      const void* row = advance(data, type, m * columns);
      if (walsh != nullptr) {
        const FlushSubnormals flush;
        walsh_blocks(*walsh, row, transformed, type, columns / walsh->n, isa, walsh_work);
        row = transformed;
      }
      bool finite = true;
      const float scale = token_scale(kernels, row, type, columns, qmax, clip, finite);
      if (!finite) {
        int64_t seen = bad_token.load();
        while (m < seen && !bad_token.compare_exchange_weak(seen, m)) {
        }
        continue;
      }
      scale_out[m] = scale;
      int8_t* to = packed ? plain : reinterpret_cast<int8_t*>(out + m * width);
      kernels.quantize(row, type, columns, scale > 0.0f ? 1.0f / scale : 0.0f, qmax, to);
      if (packed) pack_nibbles(to, columns, out + m * width);
    }
  });
  if (bad_token.load() != std::numeric_limits<int64_t>::max()) {
    fail(op + ": x must be finite, but token " + std::to_string(bad_token.load()) +
         " holds NaN or Inf; find its source, or replace it with torch.nan_to_num");
  }
  return {q, scales};
}

}  // namespace rcp::binding
