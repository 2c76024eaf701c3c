// The Walsh-Hadamard transform of contiguous blocks of n = m * 2^k numbers.
//
//   natural = (H_m kron H_{2^k}) x        y[s] = scale * natural[permutation[s]]
//
// float32 throughout, in one order of operations on every ISA: butterfly stages of stride 1, 2, 4, ..., then the
// m-point sum over ascending j, then one multiplication by the scale, then one rounding to the output's type. So all
// ISAs agree bit for bit. Subnormals are flushed to zero inside (they cost a microcode assist each), the caller's mode
// comes back.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rcp/cpu/isa.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/quantize_activation.h"
#include "rcp/cpu/scratch.h"
#include "rcp/cpu/walsh_transform_plan.h"
#include "rcp/float_types.h"
#if RCP_X86
#include "rcp/cpu/walsh_transform_avx2.h"
#include "rcp/cpu/walsh_transform_avx512.h"
#endif

namespace rcp {

// What to transform a block with. base is H_m [m, m] of +-1 (null for m = 1); permutation has n entries (null for
// natural order; for m = 1 its presence alone says sequency order).
struct WalshTransform {
  int64_t n, m;
  int bits;  // k
  const float* base;
  const int32_t* permutation;
  float scale;
  bool inverse;

  // Floats of working memory for one thread.
  int64_t scratch_floats() const { return m == 1 ? n : 2 * n; }
};

// Subnormals count as zero and become zero while one of these lives.
class FlushSubnormals {
 public:
#if RCP_X86
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

namespace detail {

inline void butterflies(float* x, int64_t n) {
  for (int64_t stride = 1; stride < n; stride *= 2) {
    for (int64_t outer = 0; outer < n; outer += 2 * stride) {
      for (int64_t i = outer; i < outer + stride; ++i) {
        const float low = x[i], high = x[i + stride];
        x[i] = low + high;
        x[i + stride] = low - high;
      }
    }
  }
}

inline void scalar_block(const WalshTransform& t, const void* x, void* y, FloatType type, float* scratch) {
  for (int64_t i = 0; i < t.n; ++i) scratch[i] = load_float(x, type, i);
  butterflies(scratch, t.n);
  for (int64_t i = 0; i < t.n; ++i) {
    const int64_t to = t.permutation ? sequency_of(static_cast<uint32_t>(i), t.bits) : i;
    store_float(y, type, to, scratch[i] * t.scale);
  }
}

// out[i, :] = sum_j H[i, j] x[j, :], or with H transposed, over ascending j.
inline void multiply_base(const WalshTransform& t, Isa isa, const float* x, float* out) {
  const int64_t columns = int64_t{1} << t.bits, row_step = t.inverse ? 1 : t.m, sum_step = t.inverse ? t.m : 1;
#if RCP_X86
  if (isa >= Isa::avx512 && t.bits >= avx512::walsh::lane_bits) {
    return avx512::walsh::multiply_base(t.base, row_step, sum_step, t.m, x, out, columns);
  }
  if (isa >= Isa::avx2 && t.bits >= avx2::walsh::lane_bits) {
    return avx2::walsh::multiply_base(t.base, row_step, sum_step, t.m, x, out, columns);
  }
#endif
  (void)isa;
  for (int64_t i = 0; i < t.m; ++i) {
    float* row = out + i * columns;
    std::fill_n(row, columns, 0.0f);
    for (int64_t j = 0; j < t.m; ++j) {
      const float sign = t.base[i * row_step + j * sum_step];
      for (int64_t c = 0; c < columns; ++c) row[c] += sign * x[j * columns + c];
    }
  }
}

inline void power_of_two(Isa isa, const void* x, void* y, FloatType type, int64_t blocks, int bits, float scale,
                         bool sequency, float* scratch);

// m > 1: the power-of-two part of each of the m runs, then the m-point sums.
inline void general_block(const WalshTransform& t, const void* x, void* y, FloatType type, Isa isa, float* scratch) {
  float* a = scratch;
  float* b = scratch + t.n;
  const bool gather = t.permutation != nullptr && t.inverse;
  for (int64_t i = 0; i < t.n; ++i) a[gather ? t.permutation[i] : i] = load_float(x, type, i);
  if (t.bits > 0) power_of_two(isa, a, a, FloatType::float32, t.m, t.bits, 1.0f, false, b);
  multiply_base(t, isa, a, b);
  const bool scatter = t.permutation != nullptr && !t.inverse;
  for (int64_t s = 0; s < t.n; ++s) store_float(y, type, s, b[scatter ? t.permutation[s] : s] * t.scale);
}

inline void power_of_two(Isa isa, const void* x, void* y, FloatType type, int64_t blocks, int bits, float scale,
                         bool sequency, float* scratch) {
#if RCP_X86
  if (isa >= Isa::avx512) {
    avx512::walsh::walsh_blocks(x, y, type, blocks, bits, scale, sequency, scratch);
    return;
  }
  if (isa == Isa::avx2) {
    avx2::walsh::walsh_blocks(x, y, type, blocks, bits, scale, sequency, scratch);
    return;
  }
#endif
  (void)isa;
  static const int32_t present = 0;
  const int64_t n = int64_t{1} << bits;
  const WalshTransform t{n, 1, bits, nullptr, sequency ? &present : nullptr, scale, false};
  for (int64_t b = 0; b < blocks; ++b) {
    scalar_block(t, advance(x, type, b * n), const_cast<void*>(advance(y, type, b * n)), type, scratch);
  }
}

}  // namespace detail

// Transforms `blocks` contiguous blocks on the calling thread; y may be x. The matrix of either order is symmetric for
// m = 1, so there the inverse is the transform itself. Subnormals are the caller's business.
inline void walsh_blocks(const WalshTransform& t, const void* x, void* y, FloatType type, int64_t blocks, Isa isa,
                         float* scratch) {
  if (t.m == 1) {
    detail::power_of_two(isa, x, y, type, blocks, t.bits, t.scale, t.permutation != nullptr, scratch);
    return;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    detail::general_block(t, advance(x, type, b * t.n), const_cast<void*>(advance(y, type, b * t.n)), type, isa,
                          scratch);
  }
}

// All blocks, on the pool. About 32k elements (5 us) are worth a thread.
inline void walsh_transform(const WalshTransform& t, const void* x, void* y, FloatType type, int64_t blocks, Isa isa,
                            const ThreadPool& pool) {
  const int64_t piece = std::max<int64_t>(1, (1 << 14) / t.n);
  const ThreadPool one{1, nullptr};
  parallel_pieces(blocks * t.n < (1 << 15) ? one : pool, blocks, piece, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    Scratch scratch(t.scratch_floats() * 4);
    walsh_blocks(t, advance(x, type, begin * t.n), const_cast<void*>(advance(y, type, begin * t.n)), type, end - begin,
                 isa, scratch.take<float>(t.scratch_floats()));
  });
}

}  // namespace rcp
