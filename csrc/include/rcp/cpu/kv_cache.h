// The 4-bit key-value cache: append, dequantize, and attention of a few query tokens on the packed cache.
//
// A piece of work is one chunk of 256 positions of one key-value head of one sequence. The result of a chunk does not
// depend on its thread, and chunks are joined in ascending order. So any number of threads and any instruction set give
// the same bits.
#pragma once

#include <cstring>
#include <vector>

#include "rcp/cpu/kv_cache_call.h"
#include "rcp/cpu/lanes16.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"

#define RCP_KERNELS "rcp/cpu/kv_cache_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

namespace detail {

// Calls f(i) for each of `count` vectors. A second thread pays from about 64k elements (10 us) on.
template <class F>
void for_each_vector(int64_t count, int64_t head_dim, const ThreadPool& pool, const F& f) {
  const int64_t piece = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(head_dim, 1));
  parallel_pieces(pool.serial_if(count * head_dim < (1 << 16)), count, piece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace detail

// Appends x [vectors, tokens, head_dim] at positions [position, position + tokens). row(vector, token) is the address
// of a row of x. `bad` gets the first vector * tokens + token that cannot be stored; all others are stored.
template <class Row>
void kv_cache_append(const Row& row, FloatType type, int64_t vectors, int64_t tokens, const KvShape& shape, float clip,
                     int64_t position, uint8_t* codes, uint16_t* scales, FirstIndex& bad, Isa isa,
                     const ThreadPool& pool) {
  const KvKernels& kernels = RCP_FOR_ISA(isa, kv_kernels);
  detail::for_each_vector(vectors * tokens, shape.head_dim, pool, [&](int64_t i) {
    const int64_t at = i / tokens * shape.capacity + position + i % tokens;
    const void* x = row(i / tokens, i % tokens);
    if (!kernels.append(x, type, shape, clip, codes + at * shape.row_bytes(), scales + 2 * at)) bad.report(i);
  });
}

// The first `length` positions as out [vectors, length, head_dim].
inline void kv_cache_dequantize(const uint8_t* codes, const uint16_t* scales, int64_t vectors, int64_t length,
                                const KvShape& shape, FloatType type, void* out, Isa isa, const ThreadPool& pool) {
  const KvKernels& kernels = RCP_FOR_ISA(isa, kv_kernels);
  detail::for_each_vector(vectors * length, shape.head_dim, pool, [&](int64_t i) {
    const int64_t at = i / length * shape.capacity + i % length;
    kernels.dequantize(codes + at * shape.row_bytes(), scales + 2 * at, shape, type,
                       advance(out, type, i * shape.head_dim));
  });
}

struct KvAttention {
  KvShape shape;
  FloatType type;  // of query and out, [batch, kv_heads * groups, queries, head_dim]
  const void* query;
  void* out;
  const uint8_t *key_codes, *value_codes;
  const uint16_t *key_scales, *value_scales;
  int64_t batch, kv_heads, groups, queries, length;
  float scale;
  bool causal;          // the last query is at the last position; each attends to its own position and those before
  int64_t window;       // each attends to this many positions at most, its own included; 0: all
  const uint8_t* mask;  // bool, true where a query may attend; or null
  int64_t mask_batch, mask_head, mask_query;  // strides of the mask; positions are contiguous
};

namespace detail {

// The positions that each query row of a head may attend to before the mask, and the chunks that hold any of them.
struct KvSpan {
  std::vector<int64_t> begin, end;  // [rows]
  int64_t first, last, first_chunk, chunks;

  explicit KvSpan(const KvAttention& a) : first(a.length), last(0) {
    for (int64_t r = 0; r < a.groups * a.queries; ++r) {
      const int64_t at = a.length - a.queries + r % a.queries;
      end.push_back(a.causal ? at + 1 : a.length);
      begin.push_back(a.window > 0 ? std::max<int64_t>(0, at - a.window + 1) : 0);
      first = std::min(first, begin.back());
      last = std::max(last, end.back());
    }
    first_chunk = first / kv_chunk;
    chunks = std::max<int64_t>(0, (last + kv_chunk - 1) / kv_chunk - first_chunk);
  }
};

// The mask of each query row of one key-value head.
inline std::vector<const uint8_t*> kv_masks(const KvAttention& a, int64_t head) {
  std::vector<const uint8_t*> masks;
  for (int64_t r = 0; a.mask != nullptr && r < a.groups * a.queries; ++r) {
    const int64_t query_head = head % a.kv_heads * a.groups + r / a.queries;
    masks.push_back(a.mask + head / a.kv_heads * a.mask_batch + query_head * a.mask_head +
                    r % a.queries * a.mask_query);
  }
  return masks;
}

}  // namespace detail

// Returns false where query holds NaN or Inf.
inline bool kv_cache_attention(const KvAttention& a, Isa isa, const ThreadPool& pool) {
  const KvKernels& kernels = RCP_FOR_ISA(isa, kv_kernels);
  const int64_t heads = a.batch * a.kv_heads, rows = a.groups * a.queries, padded = a.shape.padded();
  if (heads * rows == 0) return true;
  const detail::KvSpan span(a);
  // A partial result: the maximum and the sum of each row, and from an aligned address on the values of each row.
  const int64_t chunks = span.chunks, stride = rows * (padded + 16);
  Scratch scratch(Scratch::size_of<float>(heads * rows * padded) + Scratch::size_of<float>(heads * rows) +
                  Scratch::size_of<float>(heads * chunks * stride));
  float* query = scratch.take<float>(heads * rows * padded);
  float* query_sum = scratch.take<float>(heads * rows);
  float* partial = scratch.take<float>(heads * chunks * stride);
  const float scale = static_cast<float>(static_cast<double>(a.scale) * 1.4426950408889634);
  bool finite = true;
  for (int64_t i = 0; i < heads * rows; ++i) {
    finite &= kernels.prepare_query(advance(a.query, a.type, i * a.shape.head_dim), a.type, a.shape, scale,
                                    query + i * padded, query_sum + i);
  }
  if (!finite) return false;
  // A second thread pays from about 10 us on: 64k cached values with one row.
  const bool small = heads * (span.last - span.first) * a.shape.head_dim * std::max<int64_t>(rows, 2) < (1 << 17);
  const ThreadPool threads = pool.serial_if(small);
  parallel_pieces(threads, heads * chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; ++piece) {
      const int64_t head = piece / chunks, chunk = span.first_chunk + piece % chunks;
      const std::vector<const uint8_t*> masks = detail::kv_masks(a, head);
      const KvRows these{query + head * rows * padded,
                         query_sum + head * rows,
                         span.begin.data(),
                         span.end.data(),
                         a.mask == nullptr ? nullptr : masks.data(),
                         rows};
      const int64_t codes = head * a.shape.capacity * a.shape.row_bytes(), scales = head * a.shape.capacity * 2;
      float* out = partial + piece * stride;
      kernels.chunk(a.shape, these, {a.key_codes + codes, a.key_scales + scales},
                    {a.value_codes + codes, a.value_scales + scales}, std::max(span.first, chunk * kv_chunk),
                    std::min(span.last, (chunk + 1) * kv_chunk), {out, out + rows, out + 16 * rows});
    }
  });
  const int64_t rows_a_piece = std::max<int64_t>(1, (1 << 14) / (padded * std::max<int64_t>(chunks, 1)));
  parallel_pieces(threads, heads * rows, rows_a_piece, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const float* head = partial + i / rows * chunks * stride;
      const int64_t r = i % rows;
      kernels.combine(a.shape, head + r, head + rows + r, head + 16 * rows + r * padded, chunks, stride, a.type,
                      advance(a.out, a.type, i * a.shape.head_dim));
    }
  });
  return true;
}

}  // namespace rcp
