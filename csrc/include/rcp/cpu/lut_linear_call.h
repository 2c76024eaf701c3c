// What a kernel of lut_linear is handed: everything prepared, raw pointers only.
#pragma once

#include "rcp/cpu/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp {

// One block of tokens. Activations are grouped, so that the tokens of a group lie side by side: a stride of a whole row
// (4096 bytes, say) would put all tokens of a tile into one set of the L1 cache.
struct LutLinearCall {
  WeightShape shape;
  const uint8_t* blocks;  // the chunks, after the header
  int64_t tokens;
  const int8_t* q;            // [groups][q_rows][padded_group]; within a group ordered as the plan says
  int64_t q_rows;             // per group: tokens, twice that for two planes, a multiple of 16 for AMX (zero rows)
  int64_t tiles;              // ActivationOrder::tiled: into how many tiles the tokens are split
  int64_t streams;            // row blocks that AVX-512 walks at once for one token: 1 or 4
  const int32_t* correction;  // [groups][tokens]: -128 * sum of q, undoes the +128 of the table
  const float* x;             // 16-bit activations: [groups][tokens][padded_group]
  const uint16_t* x_bf16;     // the same, where the plan's order is bf16; x is null then
  const float* factor;        // [tokens]: token scale * tensor_scale
  const float* bias;          // [row_blocks * 16] or null
  void* y;                    // [tokens][shape.rows]
  FloatType type;
};

// How the quantized activations of a group are laid out.
enum class ActivationOrder {
  rows,    // [tokens][padded_group]
  planes,  // [tokens][2][padded_group]: low and high nibbles, q = 16 * high + low
  bf16,    // [tokens][padded_group] as bfloat16: 16-bit activations whose type is that
  tiled,   // tile after tile of nearly equal size, each [padded_group / 4][tokens of the tile][4]: one pointer walks a
           // tile
};

// The first token of a tile; tile `tiles` is the end. 32 tokens in 3 tiles are 10 + 11 + 11, not 12 + 12 + 8.
inline int64_t tile_begin(int64_t tokens, int64_t tiles, int64_t tile) {
  return tokens * tile / tiles;
}

// Computes the outputs of row blocks [begin, end) for all tokens of the call.
using LutLinearKernel = void (*)(const LutLinearCall& call, int64_t begin, int64_t end);

}  // namespace rcp
