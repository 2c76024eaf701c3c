// quantize_activation and walsh_quantize.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "binding.h"
#include "binding/quantize_activation.h"
#include "rcp/cpu/quantize_activation.h"
#include "rcp/cpu/walsh_transform.h"

namespace rcp::binding {

// Quantizes every token of the contiguous x, after the transform where `walsh` is given. The transformed token is
// rounded to the type of x: the result is bit-equal to the two operators one after the other. But the token stays in
// the cache.
inline std::tuple<Tensor, Tensor> quantize_tokens(const std::string& op, const Tensor& x, FloatType type, int bits,
                                                  float clip, bool packed, const WalshTransform* walsh) {
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t tokens = columns > 0 ? x.numel() / columns : 0;
  const int64_t width = packed ? (columns + 1) / 2 : columns;
  Tensor q = empty(with_last(x, width), packed ? ScalarType::Byte : ScalarType::Char);
  std::vector<int64_t> lead = with_last(x, 1);
  lead.pop_back();
  Tensor scales = empty(lead, ScalarType::Float);
  float* scale_out = mutable_data<float>(scales);
  if (columns == 0) {
    std::fill_n(scale_out, scales.numel(), 0.0f);
    return {q, scales};
  }
  const void* from = x.const_data_ptr();
  uint8_t* out = mutable_data<uint8_t>(q);
  const Isa isa = current_isa();
  const QuantizeKernels& kernels = RCP_FOR_ISA(isa, quantize_kernels);
  const float qmax = quantization_maximum(bits);
  FirstIndex bad;
  // A second thread pays from about 64k elements (10 us) on.
  const ThreadPool pool = torch_pool().serial_if(tokens * columns < (1 << 16));
  parallel_pieces(pool, tokens, std::max<int64_t>(1, (1 << 14) / columns), [&](int64_t begin, int64_t end) {
    const int64_t row_bytes = walsh ? columns * static_cast<int64_t>(float_size(type)) : 0;
    const int64_t work = walsh ? walsh->scratch_floats() : 0;
    Scratch scratch(Scratch::size_of<int8_t>(columns) + Scratch::size_of<char>(row_bytes) +
                    Scratch::size_of<float>(work));
    int8_t* plain = scratch.take<int8_t>(columns);
    char* transformed = scratch.take<char>(row_bytes);
    float* walsh_work = scratch.take<float>(work);
    for (int64_t m = begin; m < end; ++m) {
      const void* row = advance(from, type, m * columns);
      if (walsh != nullptr) {
        const FlushSubnormals flush;
        walsh_blocks(*walsh, row, transformed, type, columns / walsh->n, isa, walsh_work);
        row = transformed;
      }
      const TokenScale token = token_scale(kernels, row, type, columns, qmax, clip);
      if (!token.finite) {
        bad.report(m);
        continue;
      }
      scale_out[m] = token.scale;
      int8_t* to = packed ? plain : reinterpret_cast<int8_t*>(out + m * width);
      kernels.quantize[type](row, columns, token.inverse, qmax, to);
      if (packed) pack_nibbles(to, columns, out + m * width);
    }
  });
  if (bad.any()) {
    fail(op + ": x must be finite, but token " + std::to_string(bad.value()) +
         " holds NaN or Inf; find its source, or replace it with torch.nan_to_num");
  }
  return {q, scales};
}

}  // namespace rcp::binding
