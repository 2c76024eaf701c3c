// y = x W^T + bias for a packed weight: prepares the activations, then runs a kernel on row blocks.
#pragma once

#include "rcp/cpu/lut_linear_plan.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/prepared_token.h"
#include "rcp/cpu/quantize_activation.h"
#include "rcp/cpu/scratch.h"

namespace rcp {

// Tokens of a block. With more, a kernel's sums would not stay in L1 beside the decoded weights.
inline constexpr int64_t lut_linear_block_tokens = 128;

namespace detail {

// q = 16 * high + low with low in [0, 15], high in [-8, 7].
inline void split_nibbles(const int8_t* q, int64_t n, int8_t* low, int8_t* high) {
  for (int64_t i = 0; i < n; ++i) {
    low[i] = static_cast<int8_t>(q[i] & 15);
    high[i] = static_cast<int8_t>((q[i] - low[i]) / 16);
  }
}

// Below this many weight-token products a call runs on the calling thread alone: waking torch's second thread costs 5
// to 10 us. The 210 layers of a 135 M parameter model (0.3 to 0.9 M weights each) took 2.3 ms a token with the second
// thread and 1.5 without.
inline int64_t serial_products(Isa isa) {
  return isa == Isa::scalar ? 1 << 16 : 1 << 21;
}

// The working memory of a call. Blocks of at most `tokens` tokens use it one after the other.
class LutLinearWork {
 public:
  LutLinearWork(const LutLinear& a, int64_t tokens)
      : a_(a),
        groups_(a.shape.groups()),
        padded_(a.shape.padded_group()),
        bias_(a.bias == nullptr ? 0 : a.shape.row_blocks() * 16),
        // AMX pads to 16 tokens, AVX2 splits into two planes.
        q_rows_(std::max((tokens + 15) / 16 * 16, 2 * tokens)),
        scratch_(Scratch::size_of<float>(bias_) + Scratch::size_of<float>(tokens) +
                 (a.act_bits == 16 ? Scratch::size_of<float>(groups_ * tokens * padded_)
                                   : Scratch::size_of<int32_t>(groups_ * tokens) +
                                         Scratch::size_of<int8_t>(groups_ * q_rows_ * padded_) +
                                         Scratch::size_of<int8_t>(tokens * padded_))) {
    call_.shape = a.shape;
    call_.blocks = a.packed + sizeof(WeightHeader);
    call_.type = a.type;
    if (a.bias != nullptr) {
      call_.bias = scratch_.take<float>(bias_);
      for (int64_t n = 0; n < bias_; ++n) {
        call_.bias[n] = n < a.shape.rows ? load_float(a.bias, a.bias_type, n) : 0.0f;
      }
    }
    call_.factor = scratch_.take<float>(tokens);
    if (a.act_bits == 16) {
      call_.x = scratch_.take<float>(groups_ * tokens * padded_);
    } else {
      call_.correction = scratch_.take<int32_t>(groups_ * tokens);
      call_.q = scratch_.take<int8_t>(groups_ * q_rows_ * padded_);
      unordered_ = scratch_.take<int8_t>(tokens * padded_);
    }
  }

  // The call for tokens [first, first + tokens).
  LutLinearCall call(const LutLinearPlan& plan, int64_t first, int64_t tokens) const {
    LutLinearCall call = call_;
    const int64_t rows = plan.order == ActivationOrder::planes ? 2 * tokens : tokens;
    call.tokens = tokens;
    call.q_rows = (rows + plan.row_multiple - 1) / plan.row_multiple * plan.row_multiple;
    call.tiles = plan.tiles;
    call.streams = plan.streams;
    call.y = advance(a_.y, a_.type, first * a_.shape.rows);
    for (int64_t g = 0; g < groups_ && call.q_rows > rows; ++g) {
      std::fill(call.q + (g * call.q_rows + rows) * padded_, call.q + (g + 1) * call.q_rows * padded_, int8_t{0});
    }
    return call;
  }

  // [padded_group] for token m of a block: the quantized values before they are reordered.
  int8_t* unordered(int64_t m) const { return unordered_ + m * padded_; }

 private:
  const LutLinear& a_;
  int64_t groups_, padded_, bias_, q_rows_;
  Scratch scratch_;
  LutLinearCall call_{};
  int8_t* unordered_ = nullptr;
};

// Widens tokens [begin, end) of a block to float32, or copies them as bfloat16.
inline void prepare_floats(const LutLinear& a, const LutLinearPlan& plan, const LutLinearCall& call, int64_t first,
                           Isa isa, int64_t begin, int64_t end) {
  const int64_t groups = a.shape.groups(), padded = a.shape.padded_group();
  PreparedToken prepared(a, isa);
  for (int64_t m = begin; m < end; ++m) {
    const void* row = prepared(first + m);
    call.factor[m] = a.tensor_scale;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (g * call.tokens + m) * padded, from = g * a.shape.group_size, n = a.shape.group_columns(g);
      if (plan.order == ActivationOrder::bf16) {
        uint16_t* out = call.x_bf16() + at;
        std::memcpy(out, advance(row, a.type, from), 2 * static_cast<std::size_t>(n));
        std::fill(out + n, out + padded, uint16_t{0});
      } else {
        float* out = call.x + at;
        for (int64_t k = 0; k < n; ++k) out[k] = load_float(row, a.type, from + k);
        std::fill(out + n, out + padded, 0.0f);
      }
    }
  }
}

// Puts the quantized values of one group of token m where the kernel reads them.
inline void reorder(const LutLinearPlan& plan, const LutLinearCall& call, int64_t group, int64_t m, const int8_t* q) {
  const int64_t padded = call.shape.padded_group();
  if (plan.order == ActivationOrder::planes) {
    int8_t* low = call.q + (group * call.q_rows + 2 * m) * padded;
    return split_nibbles(q, padded, low, low + padded);
  }
  int64_t tile = m * call.tiles / call.tokens;
  while (call.tile_begin(tile + 1) <= m) ++tile;
  const int64_t begin = call.tile_begin(tile), size = call.tile_begin(tile + 1) - begin;
  int8_t* to = call.q + (group * call.q_rows + begin) * padded + 4 * (m - begin);
  for (int64_t k = 0; k < padded; k += 4) std::memcpy(to + k * size, q + k, 4);
}

// Quantizes tokens [begin, end) of a block. `bad` gets the tokens with NaN or Inf.
inline void prepare_integers(const LutLinear& a, const LutLinearPlan& plan, const LutLinearCall& call, int64_t first,
                             Isa isa, const LutLinearWork& work, FirstIndex& bad, int64_t begin, int64_t end) {
  const QuantizeKernels& kernels = RCP_FOR_ISA(isa, quantize_kernels);
  const int64_t groups = a.shape.groups(), padded = a.shape.padded_group();
  const float qmax = quantization_maximum(a.act_bits);
  // Tiles of one token are in the order of rows.
  const bool ordered =
      plan.order == ActivationOrder::rows || (plan.order == ActivationOrder::tiled && call.tiles == call.tokens);
  PreparedToken prepared(a, isa);
  for (int64_t m = begin; m < end; ++m) {
    const void* row = prepared(first + m);
    const TokenScale token = token_scale(kernels, row, a.type, a.shape.columns, qmax, a.clip);
    if (!token.finite) {
      bad.report(first + m);
      continue;
    }
    call.factor[m] = token.scale * a.tensor_scale;
    for (int64_t g = 0; g < groups; ++g) {
      int8_t* q = ordered ? call.q + (g * call.q_rows + m) * padded : work.unordered(m);
      const int64_t n = a.shape.group_columns(g);
      kernels.quantize[a.type](advance(row, a.type, g * a.shape.group_size), n, token.inverse, qmax, q);
      std::fill(q + n, q + padded, int8_t{0});
      call.correction[g * call.tokens + m] = -128 * kernels.sum(q, n);
      if (!ordered) reorder(plan, call, g, m, q);
    }
  }
}

// Prepares the tokens of a block that begins at token `first`. Throws std::invalid_argument for NaN or Inf in a token
// that is to be quantized.
inline void prepare_tokens(const LutLinear& a, const LutLinearPlan& plan, const LutLinearCall& call, int64_t first,
                           Isa isa, const LutLinearWork& work, const ThreadPool& pool) {
  FirstIndex bad;
  const bool small = call.tokens * a.shape.groups() * a.shape.padded_group() < (1 << 16);
  parallel_pieces(pool.serial_if(small), call.tokens, 4, [&](int64_t begin, int64_t end) {
    if (a.act_bits == 16) {
      prepare_floats(a, plan, call, first, isa, begin, end);
    } else {
      prepare_integers(a, plan, call, first, isa, work, bad, begin, end);
    }
  });
  if (bad.any()) {
    throw std::invalid_argument("lut_linear: x must be finite for act_bits " + std::to_string(a.act_bits) +
                                ", but token " + std::to_string(bad.value()) +
                                " holds NaN or Inf; find its source, or use act_bits=16, which lets them through");
  }
}

// y += residual for the rows of blocks [begin, end), which this thread has just written: they are in its cache.
inline void add_residual(const LutLinear& a, int64_t first, int64_t tokens, Isa isa, int64_t begin, int64_t end) {
  const auto add_to = RCP_FOR_ISA(isa, prologue_kernels).add_to[a.type];
  const int64_t row = begin * 16, rows = std::min(end * 16, a.shape.rows) - row;
  for (int64_t m = first; m < first + tokens; ++m) {
    const int64_t at = m * a.shape.rows + row;
    add_to(advance(a.residual, a.type, at), rows, advance(a.y, a.type, at));
  }
}

// Runs the plan's kernel on all row blocks.
inline void multiply(const LutLinear& a, const LutLinearPlan& plan, const LutLinearCall& call, int64_t first, Isa isa,
                     const ThreadPool& pool) {
  const int64_t blocks = a.shape.row_blocks();
  const bool small = a.shape.rows * a.shape.columns * call.tokens < serial_products(isa);
  // About eight pieces a thread. AMX works on pairs of row blocks and four streams on fours, so pieces are multiples of
  // four row blocks where there are enough of them.
  const int64_t piece = std::max<int64_t>(2, blocks / (8 * std::max(pool.threads, 1)) / 4 * 4);
  // vdpbf16ps takes subnormals as zero in every mode. The other kernels of bfloat16 follow it.
  const bool flushes = a.act_bits == 16 && a.type == FloatType::bfloat16;
  parallel_pieces(pool.serial_if(small), blocks, piece, [&](int64_t begin, int64_t end) {
    {
      std::optional<FlushSubnormals> flush;
      if (flushes) flush.emplace();
      plan.kernel(call, begin, end);
    }
    if (a.residual != nullptr) add_residual(a, first, call.tokens, isa, begin, end);
  });
}

}  // namespace detail

// Throws std::invalid_argument for an x with NaN or Inf where act_bits is 4 or 8. With 16 they spread, as in nn.Linear.
// `plan` is for tests.
inline void lut_linear(const LutLinear& a, Isa isa, const ThreadPool& pool,
                       decltype(lut_linear_plan)* plan = lut_linear_plan) {
  const int64_t most = std::min(a.tokens, lut_linear_block_tokens);
  const detail::LutLinearWork work(a, most);
  for (int64_t first = 0; first < a.tokens; first += most) {
    const int64_t tokens = std::min(most, a.tokens - first);
    const LutLinearPlan chosen = plan(isa, a.shape.bits, tokens, a.act_bits, a.type);
    const LutLinearCall call = work.call(chosen, first, tokens);
    detail::prepare_tokens(a, chosen, call, first, isa, work, pool);
    detail::multiply(a, chosen, call, first, isa, pool);
  }
}

}  // namespace rcp
