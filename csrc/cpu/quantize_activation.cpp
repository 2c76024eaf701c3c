#include "rcp/quantize_activation.h"

#include <limits>

#include "binding.h"

namespace {

using namespace rcp;
using namespace rcp::binding;

std::tuple<Tensor, Tensor> quantize_activation_cpu(const Tensor& x_in, int64_t bits, double clip, bool packed) {
  const std::string where = "quantize_activation: ";
  if (bits != 4 && bits != 8) fail(where + "bits must be 4 or 8, got " + std::to_string(bits) + "; choose one of them");
  if (!(clip > 0.0 && clip <= 1.0))
    fail(where + "clip must be in (0, 1], got " + std::to_string(clip) + "; 1.0 keeps the largest value");
  if (packed && bits != 4) fail(where + "packed storage holds two 4-bit values a byte, got bits=8; use packed=False");
  if (x_in.dim() < 1)
    fail(where +
         "x must have at least one dimension, the last being the features of a token, got a scalar; use x[None]");
  const FloatType type = float_type(x_in, where + "x");
  const Tensor x = torch::stable::contiguous(x_in);
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
  const QuantizeKernels kernels = quantize_kernels(current_isa());
  const float qmax = quantization_maximum(static_cast<int>(bits));
  std::atomic<int64_t> bad_token{std::numeric_limits<int64_t>::max()};
  ThreadPool pool = torch_pool();
  // A thread is worth waking for about 64k elements (10 us).
  if (tokens * columns < (1 << 16)) pool.threads = 1;
  parallel_pieces(pool, tokens, std::max<int64_t>(1, (1 << 14) / columns), [&](int64_t begin, int64_t end) {
    std::vector<int8_t> plain(packed ? static_cast<std::size_t>(columns) : 0);
    for (int64_t m = begin; m < end; ++m) {
      const void* row = advance(data, type, m * columns);
      bool finite = true;
      const float scale = token_scale(kernels, row, type, columns, qmax, static_cast<float>(clip), finite);
      if (!finite) {
        int64_t seen = bad_token.load();
        while (m < seen && !bad_token.compare_exchange_weak(seen, m)) {
        }
        continue;
      }
      scale_out[m] = scale;
      int8_t* to = packed ? plain.data() : reinterpret_cast<int8_t*>(out + m * width);
      kernels.quantize(row, type, columns, scale > 0.0f ? 1.0f / scale : 0.0f, qmax, to);
      if (packed) pack_nibbles(to, columns, out + m * width);
    }
  });
  if (bad_token.load() != std::numeric_limits<int64_t>::max()) {
    fail(where + "x must be finite, but token " + std::to_string(bad_token.load()) +
         " holds NaN or Inf; find its source, or replace it with torch.nan_to_num");
  }
  return {q, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcp_kernels, CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_cpu));
}
