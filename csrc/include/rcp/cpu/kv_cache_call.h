// The arguments of the kernels of the 4-bit key-value cache. docs/kv_cache.md has the numerics.
//
// A cache is codes [vectors, capacity, (head_dim + 1) / 2] bytes, even k in the low nibble, and scales
// [vectors, capacity, 2] of float16: scale, zero-point. A vector is the key or value of one head at one position.
#pragma once

#include <cstdint>

#include "rcp/cpu/isa.h"
#include "rcp/float_types.h"

namespace rcp {

// Kernels take 32 codes at a time: 16 bytes. The low nibbles fill sixteen lanes, and so do the high nibbles.
inline constexpr int64_t kv_block = 32;
// Positions that one partial softmax covers. Partial results are joined in ascending order, on any thread.
inline constexpr int64_t kv_chunk = 256;
// Query rows that share one decoding of a cached vector.
inline constexpr int64_t kv_rows = 4;
// A score (in log2) this far below the largest gets weight 0. Float32 loses 2^-64 anyway, and no number is subnormal.
inline constexpr float kv_exponent_floor = -64.0f;

struct KvShape {
  int64_t head_dim, capacity;

  int64_t row_bytes() const { return (head_dim + 1) / 2; }
  int64_t blocks() const { return (head_dim + kv_block - 1) / kv_block; }
  int64_t padded() const { return blocks() * kv_block; }
};

// The cached vectors of one head.
struct KvHead {
  const uint8_t* codes;
  const uint16_t* scales;
};

// The query rows of one key-value head, and the positions that they may attend to.
struct KvRows {
  const float* query;          // [rows, padded], times scale * log2(e); in each block the even k before the odd k
  const float* query_sum;      // [rows]
  const int64_t *begin, *end;  // [rows]: positions
  const uint8_t* const* mask;  // [rows] of bool [length], or null
  int64_t rows;
};

// Softmax over one chunk, before normalization: maximum score, sum of weights, weighted sum of values.
struct KvPartial {
  float* maximum;  // [rows]
  float* sum;      // [rows]
  float* values;   // [rows, padded], in each block the even k before the odd k
};

struct KvKernels {
  // Stores x [head_dim] as codes, scale and zero-point. Returns false where x holds NaN, Inf or a number outside
  // float16's range.
  bool (*append)(const void* x, FloatType type, const KvShape& shape, float clip, uint8_t* codes, uint16_t* scales);
  void (*dequantize)(const uint8_t* codes, const uint16_t* scales, const KvShape& shape, FloatType type, void* out);
  // Scales x and puts it in the order of KvRows::query. Returns false where x holds NaN or Inf.
  bool (*prepare_query)(const void* x, FloatType type, const KvShape& shape, float scale, float* query, float* sum);
  // Positions [first, last) of one chunk.
  void (*chunk)(const KvShape& shape, const KvRows& rows, const KvHead& keys, const KvHead& values, int64_t first,
                int64_t last, const KvPartial& out);
  // Joins the partial results of `chunks` chunks for one row. They are `stride` floats apart.
  void (*combine)(const KvShape& shape, const float* maximum, const float* sum, const float* values, int64_t chunks,
                  int64_t stride, FloatType type, void* out);
};

}  // namespace rcp
