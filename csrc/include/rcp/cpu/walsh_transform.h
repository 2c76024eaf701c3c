// The Walsh-Hadamard transform of contiguous blocks of n = m * 2^k numbers.
//
//   natural = (H_m kron H_{2^k}) x        y[s] = scale * natural[permutation[s]]
//
// All of it is float32, in one order of operations on every instruction set: butterfly stages of stride 1, 2, 4, ...,
// then the m-point sum over ascending j, then one multiplication by the scale, then one rounding to the output's type.
// So all instruction sets agree bit for bit. Subnormals are flushed to zero.
#pragma once

#include <algorithm>
#include <cstring>

#include "rcp/cpu/flush_subnormals.h"
#include "rcp/cpu/isa.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"
#include "rcp/cpu/walsh_transform_plan.h"
#include "rcp/float_types.h"
#if RCP_X86
#include "rcp/cpu/walsh_transform_avx2.h"
#include "rcp/cpu/walsh_transform_avx512.h"
#endif

namespace rcp {

// The transform of a block.
struct WalshTransform {
  int64_t n, m;
  int bits;                    // k
  const float* base;           // H_m [m, m] of +-1; null for m = 1
  const int32_t* permutation;  // [n]; null for natural order. For m = 1 any other pointer means sequency order.
  float scale;
  bool inverse;

  // Floats of working memory for one thread.
  int64_t scratch_floats() const { return m == 1 ? n : 2 * n; }
};

namespace scalar::walsh {

// The scalar walsh_blocks of walsh_transform_vector.h.
template <FloatType TYPE>
void walsh_blocks(const void* x, void* y, int64_t blocks, int bits, float scale, bool sequency, float* scratch) {
  const int64_t n = int64_t{1} << bits;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = load_float(x, TYPE, b * n + i);
    for (int64_t stride = 1; stride < n; stride *= 2) {
      for (int64_t outer = 0; outer < n; outer += 2 * stride) {
        for (int64_t i = outer; i < outer + stride; ++i) {
          const float low = scratch[i], high = scratch[i + stride];
          scratch[i] = low + high;
          scratch[i + stride] = low - high;
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = sequency ? sequency_of(static_cast<uint32_t>(i), bits) : i;
      store_float(y, TYPE, b * n + to, scratch[i] * scale);
    }
  }
}

// The scalar multiply_base of walsh_transform_vector.h.
inline void multiply_base(const float* base, int64_t row_step, int64_t sum_step, int64_t m, const float* x, float* out,
                          int64_t columns) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = out + i * columns;
    std::fill_n(row, columns, 0.0f);
    for (int64_t j = 0; j < m; ++j) {
      const float sign = base[i * row_step + j * sum_step];
      for (int64_t c = 0; c < columns; ++c) row[c] += sign * x[j * columns + c];
    }
  }
}

inline constexpr WalshKernels kernels = RCP_BY_TYPE(walsh_blocks);

}  // namespace scalar::walsh

namespace detail {

// A block with m > 1: the power-of-two part of each of the m runs, then the m-point sums.
inline void general_block(const WalshTransform& t, const void* x, void* y, FloatType type, Isa isa, float* scratch) {
  float* a = scratch;
  float* b = scratch + t.n;
  const bool gather = t.permutation != nullptr && t.inverse, scatter = t.permutation != nullptr && !t.inverse;
  for (int64_t i = 0; i < t.n; ++i) a[gather ? t.permutation[i] : i] = load_float(x, type, i);
  if (t.bits > 0) RCP_FOR_ISA(isa, walsh::kernels)[FloatType::float32](a, a, t.m, t.bits, 1.0f, false, b);
  // A register must not be longer than a run: eight lanes need 2^3 columns, sixteen 2^4.
  const Isa widest = t.bits < 3 ? Isa::scalar : t.bits < 4 ? Isa::avx2 : Isa::avx512;
  const int64_t row_step = t.inverse ? 1 : t.m, sum_step = t.inverse ? t.m : 1;
  RCP_FOR_ISA(std::min(isa, widest), walsh::multiply_base)(t.base, row_step, sum_step, t.m, a, b, int64_t{1} << t.bits);
  for (int64_t s = 0; s < t.n; ++s) store_float(y, type, s, b[scatter ? t.permutation[s] : s] * t.scale);
}

}  // namespace detail

// Transforms `blocks` contiguous blocks on the calling thread; y may be x. For m = 1 the matrix of either order is
// symmetric, so the inverse is the transform itself. The caller flushes subnormals.
inline void walsh_blocks(const WalshTransform& t, const void* x, void* y, FloatType type, int64_t blocks, Isa isa,
                         float* scratch) {
  if (t.m == 1) {
    return RCP_FOR_ISA(isa, walsh::kernels)[type](x, y, blocks, t.bits, t.scale, t.permutation != nullptr, scratch);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    detail::general_block(t, advance(x, type, b * t.n), advance(y, type, b * t.n), type, isa, scratch);
  }
}

// All blocks, on the pool. A second thread pays from about 32k elements (5 us) on.
inline void walsh_transform(const WalshTransform& t, const void* x, void* y, FloatType type, int64_t blocks, Isa isa,
                            const ThreadPool& pool) {
  const int64_t piece = std::max<int64_t>(1, (1 << 14) / t.n);
  parallel_pieces(pool.serial_if(blocks * t.n < (1 << 15)), blocks, piece, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    Scratch scratch(Scratch::size_of<float>(t.scratch_floats()));
    walsh_blocks(t, advance(x, type, begin * t.n), advance(y, type, begin * t.n), type, end - begin, isa,
                 scratch.take<float>(t.scratch_floats()));
  });
}

}  // namespace rcp
