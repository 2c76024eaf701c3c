// The arguments of lut_linear, and the steps of a token before it is quantized.
#pragma once

#include <optional>

#include "rcp/cpu/token_prologue.h"
#include "rcp/cpu/walsh_transform.h"
#include "rcp/cpu/weight_layout.h"

namespace rcp {

// y = x W^T + bias
struct LutLinear {
  WeightShape shape;
  const uint8_t* packed;  // header and chunks
  float tensor_scale;     // from the header
  const void* x;          // [tokens][columns], or [tokens][2][columns] for a gated activation; contiguous
  FloatType type;         // of x, residual and y
  int64_t tokens;
  int act_bits;
  float clip;
  const void* bias;  // [rows] or null
  FloatType bias_type;
  void* y;  // [tokens][rows], contiguous
  // The steps before quantization, in this order; each may be absent.
  RmsNorm norm;
  GatedActivation activation;      // none beside a norm
  const int64_t* input_order;      // column k belongs to x[input_order[k]]; null beside a rotation
  const WalshTransform* rotation;  // of each rotation->n columns
  // The step after: added to y after y is rounded to its type.
  const void* residual;  // [tokens][rows], contiguous; or null

  int64_t inputs() const { return activation == GatedActivation::none ? shape.columns : 2 * shape.columns; }
};

namespace detail {

// to[k] = from[order[k]], for elements of BYTES bytes.
template <int BYTES>
void gather(const void* from, const int64_t* order, int64_t n, char* to) {
  for (int64_t k = 0; k < n; ++k) std::memcpy(to + k * BYTES, static_cast<const char*>(from) + order[k] * BYTES, BYTES);
}

// Does the steps before quantization for one token after another. The results have the type of x, and are bit-equal to
// separate operators before the call.
class PreparedToken {
 public:
  PreparedToken(const LutLinear& a, Isa isa)
      : a_(a), isa_(isa), changes_(a.norm.weight != nullptr || a.activation != GatedActivation::none) {
    if (!changes_ && a.rotation == nullptr && a.input_order == nullptr) return;
    const int64_t bytes = a.shape.columns * static_cast<int64_t>(float_size(a.type));
    const int64_t first = changes_ ? bytes : 0;
    const int64_t norm = a.norm.weight == nullptr ? 0 : rms_norm_work(a.shape.columns);
    const int64_t floats = std::max(norm, a.rotation == nullptr ? 0 : a.rotation->scratch_floats());
    scratch_.emplace(Scratch::size_of<char>(first) + Scratch::size_of<char>(bytes) + Scratch::size_of<float>(floats));
    changed_ = scratch_->take<char>(first);
    row_ = scratch_->take<char>(bytes);
    work_ = scratch_->take<float>(floats);
  }

  // The prepared columns of a token, valid until the next call.
  const void* operator()(int64_t token) {
    const int64_t columns = a_.shape.columns;
    const void* row = advance(a_.x, a_.type, token * a_.inputs());
    if (changes_) {
      const FlushSubnormals flush;
      const PrologueKernels& kernels = RCP_FOR_ISA(isa_, prologue_kernels);
      if (a_.norm.weight != nullptr) {
        kernels.rms_norm[a_.type](a_.norm, row, columns, work_, changed_);
      } else {
        kernels.gated_activation[a_.type](a_.activation, row, columns, changed_);
      }
      row = changed_;
    }
    if (a_.input_order != nullptr) {
      (a_.type == FloatType::float32 ? gather<4> : gather<2>)(row, a_.input_order, columns, row_);
      return row_;
    }
    if (a_.rotation == nullptr) return row;
    const FlushSubnormals flush;
    walsh_blocks(*a_.rotation, row, row_, a_.type, columns / a_.rotation->n, isa_, work_);
    return row_;
  }

 private:
  const LutLinear& a_;
  Isa isa_;
  bool changes_;
  std::optional<Scratch> scratch_;
  char* changed_ = nullptr;
  char* row_ = nullptr;
  float* work_ = nullptr;
};

}  // namespace detail
}  // namespace rcp
