// Attention of one new token of each sequence. The queries and the key get their rotary embedding, key and value are
// written to the cache, and the queries attend to all positions in it. docs/numerics.md states the steps.
#pragma once

#include <cstring>
#include <limits>

#include "rcp/cpu/flush_subnormals.h"
#include "rcp/cpu/lanes16.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"

namespace rcp {

struct DecodeAttention {
  const void* qkv;                      // [batch][heads + 2 * kv_heads][dim]: queries, keys, values
  const void *cosine, *sine;            // [dim] for each sequence
  int64_t cosine_stride, sine_stride;   // from one sequence to the next; 0 if all have the same
  void *keys, *values;                  // [batch][kv_heads][capacity][dim]
  int64_t batch, heads, kv_heads, dim;  // dim is even
  int64_t capacity, length;             // length: positions in the cache before the call
  float scale;
  FloatType type;  // of all tensors
  void* out;       // [batch][heads][dim]

  int64_t queries_a_head() const { return heads / kv_heads; }
  int64_t positions() const { return length + 1; }
  int64_t padded_positions() const { return (positions() + 15) / 16 * 16; }
  int64_t padded_dim() const { return (dim + 15) / 16 * 16; }
  // Floats of working memory: the scores of all positions, a query, and sixteen registers or a rotated query.
  int64_t work_floats() const { return padded_positions() + padded_dim() + std::max<int64_t>(256, dim); }
};

// One head of keys and values of one sequence, and the queries that share it. By the type of the tensors.
using DecodeAttentionKernel = void(const DecodeAttention& a, int64_t batch, int64_t head, float* work);

}  // namespace rcp

#define RCP_KERNELS "rcp/cpu/decode_attention_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

inline void decode_attention(const DecodeAttention& a, Isa isa, const ThreadPool& pool) {
  const auto kernel = RCP_FOR_ISA(isa, decode_attention_kernels)[a.type];
  // A second thread pays from about 2^18 products on.
  const bool small = 2 * a.batch * a.heads * a.dim * a.positions() < 1 << 18;
  parallel_pieces(pool.serial_if(small), a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    Scratch scratch(Scratch::size_of<float>(a.work_floats()));
    float* work = scratch.take<float>(a.work_floats());
    for (int64_t i = begin; i < end; ++i) kernel(a, i / a.kv_heads, i % a.kv_heads, work);
  });
}

}  // namespace rcp
