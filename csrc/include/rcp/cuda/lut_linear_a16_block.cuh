// What a block of the kernels of lut_linear_a16.cuh is: its place in the layer, its stream of weights, its output.
#pragma once

#include "rcp/cuda/lut_linear_a16_parts.cuh"
#include "rcp/cuda/lut_linear_arguments.h"
#include "rcp/cuda/weight_header.cuh"

namespace rcp::cuda::a16 {

struct KernelArguments {
  LutLinearArguments call;
  int64_t tile_bytes;
  int row_blocks, units, units_per_split, units_per_stage, tail_sub_blocks;
};

// What a block works on, and its shared memory: [warp][2 units] of weights, x of a stage, factors of a stage. TOKENS is
// the most it takes, TOKEN_BYTES what a unit of a token takes in x.
template <class Shape, int TOKENS, int TOKEN_BYTES>
struct Block {
  static constexpr int unit_bytes = Shape::bytes(unit_sub_blocks), x_bytes = TOKENS * TOKEN_BYTES;

  const LutLinearArguments call;  // a copy, which the compiler takes apart
  const int lane, first_unit, last_unit;
  const int64_t row_tile, first_token;
  const int tokens, tail_sub_blocks, tail_unit;
  const bool active;
  uint8_t *ring, *staged;
  float* factors;
  // The next unit to copy, where from (this lane's share), and whether to the second half of the ring.
  int fetched;
  const uint8_t* from;
  bool flip = false;

  __device__ __forceinline__ Block(const KernelArguments& a, uint8_t* shared)
      : call(a.call),
        lane(threadIdx.x % 32),
        first_unit(blockIdx.y * a.units_per_split),
        last_unit(min(first_unit + a.units_per_split, a.units)),
        row_tile(static_cast<int64_t>(blockIdx.x % a.row_blocks) * (blockDim.x / 32) + threadIdx.x / 32),
        first_token(static_cast<int64_t>(blockIdx.x / a.row_blocks) * TOKENS),
        tokens(static_cast<int>(min(a.call.tokens - first_token, static_cast<int64_t>(TOKENS)))),
        tail_sub_blocks(a.tail_sub_blocks),
        tail_unit(a.units - 1),
        active(row_tile * tile_rows < a.call.rows),
        ring(shared + threadIdx.x / 32 * (2 * unit_bytes)),
        staged(shared + blockDim.x / 32 * (2 * unit_bytes)),
        factors(reinterpret_cast<float*>(staged + a.units_per_stage * x_bytes)),
        fetched(first_unit),
        from(a.call.weight + sizeof(WeightHeader) + row_tile * a.tile_bytes +
             static_cast<int64_t>(first_unit) * unit_bytes + lane * 16) {}

  __device__ __forceinline__ int sub_blocks(int unit) const {
    return unit == tail_unit ? tail_sub_blocks : unit_sub_blocks;
  }
  // Starts the copy of the next unit, if the block has one more; always one commit, so that waiting can count.
  __device__ __forceinline__ void fetch() {
    if (active && fetched < last_unit) {
      uint8_t* to = ring + (flip ? unit_bytes : 0) + lane * 16;
      // A short last unit is copied by the same instructions, each lane as far as the unit goes.
      const int bytes = fetched == tail_unit ? Shape::bytes(tail_sub_blocks) : unit_bytes;
      if (bytes == unit_bytes) {
#pragma unroll
        for (int at = 0; at < unit_bytes; at += 512) {
          if (at + 512 <= unit_bytes || lane * 16 < unit_bytes - at) copy_async(to + at, from + at);
        }
      } else {
#pragma unroll 1
        for (int at = 0; at + lane * 16 < bytes; at += 512) copy_async(to + at, from + at);
      }
    }
    copy_commit();
    from += unit_bytes;
    flip = !flip;
    ++fetched;
  }
  // Half of the ring with the oldest of two copied units: where the next one will go.
  __device__ __forceinline__ const uint8_t* oldest() const { return ring + (flip ? unit_bytes : 0); }

  __device__ __forceinline__ float tensor_scale() const {
    return header_tensor_scale(call.weight, call.bits, call.group_size, call.rows, call.columns);
  }
  __device__ __forceinline__ void store(int64_t token, int64_t row, float sum, float scale) const {
    if (token >= call.tokens || row >= call.rows) return;
    const float bias = call.bias ? load_value(call.bias, call.bias_type, row) : 0.0f;
    store_value(call.y, call.x_type, token * call.rows + row, __fmaf_rn(sum, scale, bias));
  }
};

}  // namespace rcp::cuda::a16
