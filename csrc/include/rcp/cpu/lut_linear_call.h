// The arguments of a kernel of lut_linear.
#pragma once

#include "rcp/cpu/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp {

// How the activations of a group are laid out.
enum class ActivationOrder {
  rows,    // [tokens][padded_group]
  planes,  // [tokens][2][padded_group]: low and high nibbles, q = 16 * high + low
  bf16,    // [tokens][padded_group] in bfloat16
  tiled,   // tile after tile, each [padded_group / 4][tokens of the tile][4]: one pointer reads a tile in order
};

// One block of tokens. Activations are grouped: the tokens of a group are neighbours. With a stride of a whole row
// (4096 bytes, say), all tokens of a tile would fall into one set of the L1 cache.
struct LutLinearCall {
  WeightShape shape;
  const uint8_t* blocks;  // the chunks, after the header
  int64_t tokens;
  int8_t* q;            // act_bits 4 and 8: [groups][q_rows][padded_group], a group in the plan's order
  int64_t q_rows;       // tokens; twice as many for two planes; for AMX a multiple of 16, the last ones zero
  int64_t tiles;        // ActivationOrder::tiled: the number of tiles, of nearly equal size
  int64_t streams;      // row blocks that AVX-512 reads side by side for one token: 1 or 4
  int32_t* correction;  // [groups][tokens]: -128 * sum of q, which undoes the + 128 of the table
  float* x;             // act_bits 16: [groups][tokens][padded_group], bfloat16 for ActivationOrder::bf16
  float* factor;        // [tokens]: token scale * tensor_scale
  float* bias;          // [row_blocks * 16] or null
  void* y;              // [tokens][shape.rows]
  FloatType type;       // of y

  uint16_t* x_bf16() const { return reinterpret_cast<uint16_t*>(x); }
  // The first token of a tile; `tiles` gives the end. 32 tokens in 3 tiles are 10 + 11 + 11, not 12 + 12 + 8.
  int64_t tile_begin(int64_t tile) const { return tokens * tile / tiles; }
};

// Computes the outputs of row blocks [begin, end) for all tokens of the call.
using LutLinearKernel = void (*)(const LutLinearCall& call, int64_t begin, int64_t end);

}  // namespace rcp
