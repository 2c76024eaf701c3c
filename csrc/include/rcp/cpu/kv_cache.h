// The 4-bit key-value cache: append, dequantize, and attention of a few query tokens on the packed cache.
//
// Work is cut into (batch, key-value head, chunk of 256 positions). A chunk's result does not depend on who computes
// it, and chunks are joined in ascending order: the same bits for any number of threads and any instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "rcp/cpu/kv_cache_call.h"
#include "rcp/cpu/kv_cache_scalar.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"
#if RCP_X86
#include "rcp/cpu/kv_cache_avx2.h"
#include "rcp/cpu/kv_cache_avx512.h"
#endif

namespace rcp {

inline const KvKernels& kv_kernels(Isa isa) {
#if RCP_X86
  if (isa >= Isa::avx512) return avx512::kv::kernels;
  if (isa == Isa::avx2) return avx2::kv::kernels;
#endif
  (void)isa;
  return scalar::kv::kernels;
}

// Appends x [vectors, tokens, head_dim] at positions [position, position + tokens). `row` gives the address of a
// vector. Returns the first vector * tokens + token that cannot be stored, or -1; the others are stored all the same.
template <class Row>
int64_t kv_cache_append(const Row& row, FloatType type, int64_t vectors, int64_t tokens, const KvShape& shape,
                        float clip, int64_t position, uint8_t* codes, uint16_t* scales, Isa isa,
                        const ThreadPool& pool) {
  const KvKernels& kernels = kv_kernels(isa);
  const int64_t count = vectors * tokens, none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> bad{none};
  const ThreadPool one{1, nullptr};
  // About 64k elements (10 us) are worth a thread.
  parallel_pieces(count * shape.head_dim < (1 << 16) ? one : pool, count,
                  std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(shape.head_dim, 1)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t at = i / tokens * shape.capacity + position + i % tokens;
                      if (kernels.append(row(i / tokens, i % tokens), type, shape, clip, codes + at * shape.row_bytes(),
                                         scales + 2 * at)) {
                        continue;
                      }
                      int64_t seen = bad.load();
                      while (i < seen && !bad.compare_exchange_weak(seen, i)) {
                      }
                    }
                  });
  return bad.load() == none ? -1 : bad.load();
}

// The first `length` positions as out [vectors, length, head_dim].
inline void kv_cache_dequantize(const uint8_t* codes, const uint16_t* scales, int64_t vectors, int64_t length,
                                const KvShape& shape, FloatType type, void* out, Isa isa, const ThreadPool& pool) {
  const KvKernels& kernels = kv_kernels(isa);
  const int64_t count = vectors * length;
  const ThreadPool one{1, nullptr};
  parallel_pieces(count * shape.head_dim < (1 << 16) ? one : pool, count,
                  std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(shape.head_dim, 1)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t at = i / length * shape.capacity + i % length;
                      kernels.dequantize(codes + at * shape.row_bytes(), scales + 2 * at, shape, type,
                                         const_cast<void*>(advance(out, type, i * shape.head_dim)));
                    }
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
  bool causal;          // the last query is at the last position; each sees itself and what is before it
  int64_t window;       // each sees only so many positions, itself included; 0: all
  const uint8_t* mask;  // bool, true where a query may look; or null
  int64_t mask_batch, mask_head, mask_query;  // strides of the mask; positions are contiguous
};

// Returns false where query holds NaN or Inf.
inline bool kv_cache_attention(const KvAttention& a, Isa isa, const ThreadPool& pool) {
  const KvKernels& kernels = kv_kernels(isa);
  const int64_t heads = a.batch * a.kv_heads, rows = a.groups * a.queries, padded = a.shape.padded();
  if (heads * rows == 0) return true;
  std::vector<int64_t> begin(static_cast<std::size_t>(rows)), end(static_cast<std::size_t>(rows));
  int64_t first = a.length, last = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = a.length - a.queries + r % a.queries, i = r;
    end[static_cast<std::size_t>(i)] = a.causal ? at + 1 : a.length;
    begin[static_cast<std::size_t>(i)] = a.window > 0 ? std::max<int64_t>(0, at - a.window + 1) : 0;
    first = std::min(first, begin[static_cast<std::size_t>(i)]);
    last = std::max(last, end[static_cast<std::size_t>(i)]);
  }
  const int64_t first_chunk = first / kv_chunk,
                chunks = std::max<int64_t>(0, (last + kv_chunk - 1) / kv_chunk - first_chunk);
  // Of one row: maximum, sum, and the values from a register's alignment on.
  const int64_t stride = padded + 16, chunk_floats = rows * stride;
  Scratch scratch(Scratch::size_of<float>(heads * rows * padded) + Scratch::size_of<float>(heads * rows) +
                  Scratch::size_of<float>(heads * chunks * chunk_floats));
  float* query = scratch.take<float>(heads * rows * padded);
  float* query_sum = scratch.take<float>(heads * rows);
  float* partial = scratch.take<float>(heads * chunks * chunk_floats);
  const float scale = static_cast<float>(static_cast<double>(a.scale) * 1.4426950408889634);
  bool finite = true;
  for (int64_t i = 0; i < heads * rows; ++i) {
    finite = kernels.prepare_query(advance(a.query, a.type, i * a.shape.head_dim), a.type, a.shape, scale,
                                   query + i * padded, query_sum + i) &&
             finite;
  }
  if (!finite) return false;
  const ThreadPool one{1, nullptr};
  // A thread is worth waking for about 10 us: 64k cached values with one row.
  const bool small = heads * (last - first) * a.shape.head_dim * std::max<int64_t>(rows, 2) < (1 << 17);
  parallel_pieces(small ? one : pool, heads * chunks, 1, [&](int64_t from, int64_t to) {
    std::vector<const uint8_t*> mask(static_cast<std::size_t>(rows));
    for (int64_t piece = from; piece < to; ++piece) {
      const int64_t head = piece / chunks, c = piece % chunks, b = head / a.kv_heads;
      for (int64_t r = 0; a.mask != nullptr && r < rows; ++r) {
        const int64_t query_head = head % a.kv_heads * a.groups + r / a.queries;
        mask[static_cast<std::size_t>(r)] =
            a.mask + b * a.mask_batch + query_head * a.mask_head + r % a.queries * a.mask_query;
      }
      const KvRows these{query + head * rows * padded,
                         query_sum + head * rows,
                         begin.data(),
                         end.data(),
                         a.mask == nullptr ? nullptr : mask.data(),
                         rows};
      const int64_t codes = head * a.shape.capacity * a.shape.row_bytes(), scales = head * a.shape.capacity * 2;
      float* out = partial + piece * chunk_floats;
      kernels.chunk(a.shape, these, {a.key_codes + codes, a.key_scales + scales},
                    {a.value_codes + codes, a.value_scales + scales}, std::max(first, (first_chunk + c) * kv_chunk),
                    std::min(last, (first_chunk + c + 1) * kv_chunk), {out, out + rows, out + 16 * rows});
    }
  });
  parallel_pieces(
      small ? one : pool, heads * rows, std::max<int64_t>(1, (1 << 14) / (padded * std::max<int64_t>(chunks, 1))),
      [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const float* head = partial + i / rows * chunks * chunk_floats;
          const int64_t r = i % rows;
          kernels.combine(a.shape, head + r, head + rows + r, head + 16 * rows + r * padded, chunks, chunk_floats,
                          a.type, const_cast<void*>(advance(a.out, a.type, i * a.shape.head_dim)));
        }
      });
  return true;
}

}  // namespace rcp
