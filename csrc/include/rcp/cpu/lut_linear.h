// y = x W^T + bias for a packed weight: prepares the activations, picks the kernel, deals out row blocks.
#pragma once

#include <limits>
#include <optional>

#include "rcp/cpu/isa.h"
#include "rcp/cpu/lut_linear_call.h"
#include "rcp/cpu/lut_linear_scalar.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/quantize_activation.h"
#include "rcp/cpu/scratch.h"
#include "rcp/cpu/token_prologue.h"
#include "rcp/cpu/walsh_transform.h"
#if RCP_X86
#include "rcp/cpu/lut_linear_amx.h"
#include "rcp/cpu/lut_linear_avx2.h"
#include "rcp/cpu/lut_linear_avx512.h"
#include "rcp/cpu/lut_linear_avx512_bf16.h"
#endif

namespace rcp {

struct LutLinearArguments {
  WeightShape shape;
  const uint8_t* packed;  // header and chunks
  float tensor_scale;     // from the header
  const void* x;          // [tokens][columns], or [tokens][2][columns] for a gated activation; contiguous
  FloatType type;         // of x and y
  int64_t tokens;
  int act_bits;
  float clip;
  const void* bias;  // [rows] or null
  FloatType bias_type;
  void* y;                         // [tokens][rows], contiguous
  const WalshTransform* rotation;  // of x, block by block along columns; or null
  const int64_t* input_order;      // column k belongs to x[input_order[k]]; or null. Not together with a rotation
  RmsNorm norm;                    // of x, first of all; weight null for none
  GatedActivation activation;      // of x, first of all; none beside a norm
  const void* residual;            // [tokens][rows], contiguous, added to y after y was rounded to its type; or null

  int64_t inputs() const { return activation == GatedActivation::none ? shape.columns : 2 * shape.columns; }
};

namespace detail {

// to[k] = from[order[k]], for elements of so many bytes.
template <int BYTES>
void gather(const void* from, const int64_t* order, int64_t n, char* to) {
  for (int64_t k = 0; k < n; ++k) std::memcpy(to + k * BYTES, static_cast<const char*>(from) + order[k] * BYTES, BYTES);
}

// A token as the weight's columns meet it, in the type of x: after the norm or the activation, then in the order of the
// columns or after the rotation. The result is bit-equal to separate operators before the call.
class PreparedToken {
 public:
  PreparedToken(const LutLinearArguments& a, Isa isa) : a_(a), isa_(isa) {
    changes_ = a.norm.weight != nullptr || a.activation != GatedActivation::none;
    if (!changes_ && a.rotation == nullptr && a.input_order == nullptr) return;
    const int64_t bytes = a.shape.columns * static_cast<int64_t>(float_size(a.type));
    const int64_t first = changes_ ? bytes : 0;
    const int64_t norm = a.norm.weight == nullptr ? 0 : rms_norm_work(a.shape.columns);
    const int64_t floats = std::max(norm, a.rotation == nullptr ? 0 : a.rotation->scratch_floats());
    scratch_.emplace(Scratch::size_of<char>(first) + Scratch::size_of<char>(bytes) + Scratch::size_of<float>(floats));
    changed_ = scratch_->take<char>(first);
    row_ = scratch_->take<char>(bytes);
    work_ = scratch_->take<float>(floats);
    if (changes_) kernels_ = prologue_kernels(isa);
  }
  const void* operator()(const void* row) {
    if (changes_) {
      const FlushSubnormals flush;
      if (a_.norm.weight != nullptr) {
        kernels_.rms_norm(a_.norm, row, a_.type, a_.shape.columns, work_, changed_);
      } else {
        kernels_.gated_activation(a_.activation, row, a_.type, a_.shape.columns, changed_);
      }
      row = changed_;
    }
    if (a_.input_order != nullptr) {
      if (a_.type == FloatType::float32) {
        gather<4>(row, a_.input_order, a_.shape.columns, row_);
      } else {
        gather<2>(row, a_.input_order, a_.shape.columns, row_);
      }
      return row_;
    }
    if (a_.rotation == nullptr) return row;
    const FlushSubnormals flush;
    walsh_blocks(*a_.rotation, row, row_, a_.type, a_.shape.columns / a_.rotation->n, isa_, work_);
    return row_;
  }

 private:
  const LutLinearArguments& a_;
  Isa isa_;
  bool changes_;
  PrologueKernels kernels_{};
  std::optional<Scratch> scratch_;
  char* changed_ = nullptr;
  char* row_ = nullptr;
  float* work_ = nullptr;
};

struct Plan {
  LutLinearKernel kernel;
  ActivationOrder order = ActivationOrder::rows;
  int64_t tiles = 1;
  int64_t row_multiple = 1;  // q gets zero rows up to a multiple of this
  int64_t streams = 1;       // see LutLinearCall
};

template <int BITS>
Plan plan_for(Isa isa, int64_t tokens, int act_bits, FloatType type) {
  const bool integer = act_bits != 16;
#if RCP_X86
  // AMX from 16 tokens, a full tile; below that its tiles run partly empty and VNNI is as fast.
  if (isa == Isa::amx && integer && tokens >= 16) {
    return {amx::lut_linear_many<BITS, amx::AmxTiles>, ActivationOrder::rows, 1, 16};
  }
  if (isa >= Isa::avx512) {
    if (!integer) {
      static const bool bf16 = bf16_usable();
      if (bf16 && type == FloatType::bfloat16) return {avx512::lut_linear_bf16<BITS>, ActivationOrder::bf16};
      return {avx512::lut_linear_float<BITS>};
    }
    const int64_t tiles = (tokens + avx512::tile_tokens - 1) / avx512::tile_tokens;
    static const int64_t streams = is_intel() ? 4 : 1;
    return {avx512::lut_linear<BITS>, ActivationOrder::tiled, tiles, 1, streams};
  }
  if (isa == Isa::avx2) {
    const ActivationOrder order = act_bits == 8 ? ActivationOrder::planes : ActivationOrder::rows;
    return {avx2::kernel_for<BITS>(integer, order == ActivationOrder::planes), order};
  }
#endif
  (void)isa;
  (void)tokens;
  (void)type;
  return {integer ? scalar::lut_linear<true> : scalar::lut_linear<false>};
}

inline Plan plan(Isa isa, int bits, int64_t tokens, int act_bits, FloatType type) {
  if (bits == 2) return plan_for<2>(isa, tokens, act_bits, type);
  if (bits == 3) return plan_for<3>(isa, tokens, act_bits, type);
  return plan_for<4>(isa, tokens, act_bits, type);
}

// q = 16 * high + low with low in [0, 15], high in [-8, 7].
inline void split_nibbles(const int8_t* q, int64_t n, int8_t* low, int8_t* high) {
  for (int64_t i = 0; i < n; ++i) {
    low[i] = static_cast<int8_t>(q[i] & 15);
    high[i] = static_cast<int8_t>((q[i] - low[i]) / 16);
  }
}

// Below this many weight-token products a call runs on the calling thread alone. Waking torch's second thread costs 5
// to 10 us: the 210 layers of a 135 M parameter model (0.3 to 0.9 M weights each) took 2.3 ms a token with it and 1.5
// without.
inline int64_t serial_products(Isa isa) {
  return isa == Isa::scalar ? 1 << 16 : 1 << 21;
}

}  // namespace detail

// Tokens are taken in blocks of at most this many, so that a kernel's totals stay in L1 beside the decoded weights.
inline constexpr int64_t lut_linear_block_tokens = 128;

// Throws std::invalid_argument for an x with NaN or Inf (integer activations only: 16-bit ones let them through, as
// nn.Linear does).
inline void lut_linear(const LutLinearArguments& a, Isa isa, const ThreadPool& pool,
                       detail::Plan (*plan)(Isa, int, int64_t, int, FloatType) = detail::plan) {
  const WeightShape& shape = a.shape;
  const int64_t groups = shape.groups(), padded = shape.padded_group(), width = groups * padded;
  const bool integer = a.act_bits != 16;
  const QuantizeKernels kernels = quantize_kernels(isa);
  const float qmax = quantization_maximum(a.act_bits);
  const int64_t most = std::min(a.tokens, lut_linear_block_tokens);
  const int64_t bias_floats = a.bias == nullptr ? 0 : shape.row_blocks() * 16;
  // AMX pads to 16 tokens, AVX2 splits into two planes.
  const int64_t most_rows = std::max((most + 15) / 16 * 16, 2 * most);
  Scratch scratch(Scratch::size_of<float>(bias_floats) + Scratch::size_of<float>(most) +
                  (integer ? Scratch::size_of<int32_t>(groups * most) + Scratch::size_of<int8_t>(most_rows * width) +
                                 Scratch::size_of<int8_t>(most * padded)
                           : Scratch::size_of<float>(most * width)));
  float* bias = nullptr;
  if (a.bias != nullptr) {
    bias = scratch.take<float>(bias_floats);
    for (int64_t n = 0; n < bias_floats; ++n) bias[n] = n < shape.rows ? load_float(a.bias, a.bias_type, n) : 0.0f;
  }
  float* factor = scratch.take<float>(most);
  int32_t* correction = integer ? scratch.take<int32_t>(groups * most) : nullptr;
  int8_t* q = integer ? scratch.take<int8_t>(most_rows * width) : nullptr;
  int8_t* plain = integer ? scratch.take<int8_t>(most * padded) : nullptr;
  float* x = integer ? nullptr : scratch.take<float>(most * width);

  for (int64_t token0 = 0; token0 < a.tokens; token0 += most) {
    const int64_t tokens = std::min(most, a.tokens - token0);
    const detail::Plan chosen = plan(isa, shape.bits, tokens, a.act_bits, a.type);
    const int64_t rows = chosen.order == ActivationOrder::planes ? 2 * tokens : tokens;
    const int64_t q_rows = (rows + chosen.row_multiple - 1) / chosen.row_multiple * chosen.row_multiple;
    std::atomic<int64_t> bad_token{std::numeric_limits<int64_t>::max()};

    using detail::PreparedToken;
    const auto prepare_float = [&](int64_t begin, int64_t end) {
      PreparedToken prepared(a, isa);
      for (int64_t m = begin; m < end; ++m) {
        const void* row = prepared(advance(a.x, a.type, (token0 + m) * a.inputs()));
        factor[m] = a.tensor_scale;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t at = (g * tokens + m) * padded, first = g * shape.group_size;
          const int64_t n = std::min(shape.group_size, shape.columns - first);
          if (chosen.order == ActivationOrder::bf16) {
            uint16_t* out = reinterpret_cast<uint16_t*>(x) + at;
            std::memcpy(out, advance(row, a.type, first), 2 * static_cast<std::size_t>(n));
            std::fill(out + n, out + padded, uint16_t{0});
          } else {
            for (int64_t k = 0; k < n; ++k) x[at + k] = load_float(row, a.type, first + k);
            std::fill(x + at + n, x + at + padded, 0.0f);
          }
        }
      }
    };
    const auto prepare_integer = [&](int64_t begin, int64_t end) {
      PreparedToken prepared(a, isa);
      for (int64_t m = begin; m < end; ++m) {
        const void* row = prepared(advance(a.x, a.type, (token0 + m) * a.inputs()));
        bool finite = true;
        const float scale = token_scale(kernels, row, a.type, shape.columns, qmax, a.clip, finite);
        if (!finite) {
          int64_t seen = bad_token.load();
          while (token0 + m < seen && !bad_token.compare_exchange_weak(seen, token0 + m)) {
          }
          continue;
        }
        factor[m] = scale * a.tensor_scale;
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        int64_t tile = m * chosen.tiles / tokens;
        while (tile_begin(tokens, chosen.tiles, tile + 1) <= m) ++tile;
        const int64_t tile0 = tile_begin(tokens, chosen.tiles, tile);
        const int64_t tile_size = tile_begin(tokens, chosen.tiles, tile + 1) - tile0;
        // A tile of one token is already in its final order.
        const bool direct =
            chosen.order == ActivationOrder::rows || (chosen.order == ActivationOrder::tiled && tile_size == 1);
        for (int64_t g = 0; g < groups; ++g) {
          int8_t* out = direct ? q + (g * q_rows + m) * padded : plain + m * padded;
          const int64_t n = std::min(shape.group_size, shape.columns - g * shape.group_size);
          kernels.quantize(advance(row, a.type, g * shape.group_size), a.type, n, inverse, qmax, out);
          std::fill(out + n, out + padded, static_cast<int8_t>(0));
          correction[g * tokens + m] = -128 * kernels.sum(out, n);
          if (direct) continue;
          if (chosen.order == ActivationOrder::tiled) {
            int8_t* to = q + (g * q_rows + tile0) * padded + 4 * (m - tile0);
            for (int64_t k = 0; k < padded; k += 4) std::memcpy(to + k * tile_size, out + k, 4);
          } else {
            int8_t* low = q + (g * q_rows + 2 * m) * padded;
            detail::split_nibbles(out, padded, low, low + padded);
          }
        }
      }
    };

    const bool serial_prepare = tokens * width < (1 << 16);
    const ThreadPool one{1, nullptr};
    if (integer) {
      parallel_pieces(serial_prepare ? one : pool, tokens, 4, prepare_integer);
      for (int64_t g = 0; g < groups && q_rows > rows; ++g) {
        std::fill(q + (g * q_rows + rows) * padded, q + (g + 1) * q_rows * padded, static_cast<int8_t>(0));
      }
    } else {
      parallel_pieces(serial_prepare ? one : pool, tokens, 4, prepare_float);
    }
    if (bad_token.load() != std::numeric_limits<int64_t>::max()) {
      throw std::invalid_argument("lut_linear: x must be finite to be quantized to " + std::to_string(a.act_bits) +
                                  " bits, but token " + std::to_string(bad_token.load()) +
                                  " holds NaN or Inf; find its source, or use act_bits=16, which lets them through");
    }

    const LutLinearCall call{shape,
                             a.packed + sizeof(WeightHeader),
                             tokens,
                             q,
                             q_rows,
                             chosen.tiles,
                             chosen.streams,
                             correction,
                             chosen.order == ActivationOrder::bf16 ? nullptr : x,
                             chosen.order == ActivationOrder::bf16 ? reinterpret_cast<const uint16_t*>(x) : nullptr,
                             factor,
                             bias,
                             static_cast<char*>(a.y) + token0 * shape.rows * static_cast<int64_t>(float_size(a.type)),
                             a.type};
    const bool serial = shape.rows * shape.columns * tokens < detail::serial_products(isa);
    // About eight pieces a thread, of a multiple of 4 row blocks where there are that many: AMX works on pairs, four
    // streams on fours.
    const int64_t piece = std::max<int64_t>(2, shape.row_blocks() / (8 * std::max(pool.threads, 1)) / 4 * 4);
    parallel_pieces(serial ? one : pool, shape.row_blocks(), piece, [&](int64_t begin, int64_t end) {
      {
        // vdpbf16ps takes subnormals for zero whatever the mode says: the other paths follow it.
        std::optional<FlushSubnormals> flush;
        if (!integer && a.type == FloatType::bfloat16) flush.emplace();
        chosen.kernel(call, begin, end);
      }
      if (a.residual == nullptr) return;
      // The rows that this thread has just written, while they are in its cache.
      const PrologueKernels epilogue = prologue_kernels(isa);
      const int64_t first = begin * 16, rows_here = std::min(end * 16, shape.rows) - first;
      for (int64_t m = 0; m < tokens; ++m) {
        const int64_t at = (token0 + m) * shape.rows + first;
        epilogue.add_to(advance(a.residual, a.type, at), a.type, rows_here,
                        const_cast<void*>(advance(a.y, a.type, at)));
      }
    });
  }
}

}  // namespace rcp
