// Attention of one new token of each sequence: rotary embedding of its queries and key, its key and value into the
// cache, and the queries over all that the cache then holds. docs/numerics.md states the steps.
#pragma once

#include <limits>

#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"
#include "rcp/cpu/token_prologue.h"
#include "rcp/cpu/walsh_transform.h"

namespace rcp {

struct DecodeAttention {
  const void* qkv;                      // [batch][heads + 2 * kv_heads][dim]: queries, keys, values
  const void *cosine, *sine;            // [dim] for each sequence
  int64_t cosine_stride, sine_stride;   // from one sequence to the next; 0 if all share one
  void *keys, *values;                  // [batch][kv_heads][capacity][dim]
  int64_t batch, heads, kv_heads, dim;  // dim is even
  int64_t capacity, length;             // length: positions held before the call
  float scale;
  FloatType type;  // of all tensors
  void* out;       // [batch][heads][dim]
};

namespace scalar::decode {
using namespace rcp::scalar::kv;
using namespace rcp::scalar::prologue;
#define RCP_DECODE_TARGET
#include "rcp/cpu/decode_attention_vector.h"
#undef RCP_DECODE_TARGET
}  // namespace scalar::decode

#if RCP_X86
namespace avx2::decode {
using namespace rcp::avx2::kv;
using namespace rcp::avx2::prologue;
#define RCP_DECODE_TARGET RCP_AVX2
#include "rcp/cpu/decode_attention_vector.h"
#undef RCP_DECODE_TARGET
}  // namespace avx2::decode

namespace avx512::decode {
using namespace rcp::avx512::kv;
using namespace rcp::avx512::prologue;
#define RCP_DECODE_TARGET RCP_AVX512
#include "rcp/cpu/decode_attention_vector.h"
#undef RCP_DECODE_TARGET
}  // namespace avx512::decode
#endif

// Below this many products a call runs on the calling thread alone: waking another costs 5 to 10 us.
inline constexpr int64_t decode_attention_serial = 1 << 18;

inline void decode_attention(const DecodeAttention& a, Isa isa, const ThreadPool& pool) {
  const auto kernel = [&] {
#if RCP_X86
    if (isa >= Isa::avx512) return avx512::decode::decode_attention;
    if (isa == Isa::avx2) return avx2::decode::decode_attention;
#endif
    return scalar::decode::decode_attention;
  }();
  const int64_t floats = (a.length + 16) / 16 * 16 + (a.dim + 15) / 16 * 16 + std::max<int64_t>(256, a.dim);
  const bool serial = 2 * a.batch * a.heads * a.dim * (a.length + 1) < decode_attention_serial;
  const ThreadPool one{1, nullptr};
  parallel_pieces(serial ? one : pool, a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    Scratch scratch(Scratch::size_of<float>(floats));
    float* work = scratch.take<float>(floats);
    for (int64_t i = begin; i < end; ++i) kernel(a, i / a.kv_heads, i % a.kv_heads, work);
  });
}

}  // namespace rcp
