// lut_linear for 1 to 16 tokens, act_bits 4 and 8.
//
// One token: every block quantizes the token for itself, while its first weights are on their way: the whole token's
// maximum, but only its own columns' values. More tokens: lut_linear_quantize.cuh has made B fragments of them, which a
// warp loads as they are. Sums and the order of the work: lut_linear_stream.cuh.
#pragma once

#include "rcp/cuda/lut_linear_activation.cuh"
#include "rcp/cuda/lut_linear_quantize.cuh"
#include "rcp/cuda/lut_linear_stream.cuh"

namespace rcp::cuda {

// Dynamic shared memory: the words of activation::block_max, [warp][TILES][64] sums, the activations of the block's
// columns. With a TYPE (lut_linear_quantize.cuh) the columns are not split.
template <int BITS, int SLOT, int TYPE, int TILES>
__global__ void __launch_bounds__(32 * gemv_warps, 1) lut_linear_one_token(const GemvProblem parameters) {
  const GemvProblem p = parameters;  // a reference to the parameters themselves would make them generic memory
  extern __shared__ uint4 shared[];
  auto* words = reinterpret_cast<uint32_t*>(shared);
  int* sums = reinterpret_cast<int*>(words + activation::block_max_words);
  auto* bytes = reinterpret_cast<uint8_t*>(sums + gemv_warps * TILES * 64);
  using StreamType = stream::Stream<BITS, SLOT, 0, TILES>;
  const uint4 header = fragments::load_weight(p.weight);
  activation::prepare_block_max(words);
  StreamType main_loop(p);
  asm("" : "+r"(main_loop.lane));  // kept, not made again

  constexpr unsigned threads = 32 * gemv_warps;
  activation::TokenScale scale{};
  const auto place = [&](int piece) { return reinterpret_cast<uint2*>(bytes + activation::piece_offset<SLOT>(piece)); };
  if constexpr (TYPE != any_type) {
    constexpr auto type = static_cast<FloatType>(TYPE);
    const auto low = activation::load_whole_piece<type>(p.x, threadIdx.x);
    const auto high = activation::load_whole_piece<type>(p.x, threadIdx.x, threads);
    scale = activation::scale_of_two<type>(low, high, words, main_loop.warp, main_loop.lane, p.qmax, p.qmax_inverse,
                                           p.qmax_inverse_high, p.qmax_inverse_low);
    *place(threadIdx.x) = activation::round_piece(low, scale.reciprocal, p.qmax);
    *place(threadIdx.x + threads) = activation::round_piece(high, scale.reciprocal, p.qmax);
  } else {
    const int piece_begin = main_loop.unit_begin * activation::unit_pieces;
    const int piece_end = main_loop.unit_end * activation::unit_pieces;
    uint32_t largest = 0;
    float x[activation::piece_columns];
#pragma unroll 1
    for (int piece = threadIdx.x; piece * activation::piece_columns < p.columns; piece += threads) {
      activation::load_piece(p.x, p.y_type, piece, p.columns, x);
      largest = activation::largest_of(x, largest);
    }
    scale = activation::token_scale(
        activation::block_max<FloatType::float32>(largest, words, main_loop.warp, main_loop.lane), p.clip, p.qmax,
        p.qmax_inverse);
#pragma unroll 1
    for (int piece = piece_begin + threadIdx.x; piece < piece_end; piece += threads) {
      activation::load_piece(p.x, p.y_type, piece, p.columns, x);
      *place(piece - piece_begin) = activation::round_piece(x, scale.reciprocal, p.clip < 1.0f, p.qmax);
    }
  }
  __syncthreads();

  main_loop.run(
      [&](int unit, uint32_t (&activation)[unit_sub_blocks][1][8]) {
        using PartType = fragments::Part<BITS, SLOT>;
        constexpr int steps = PartType::slot_columns / 32;
        const int lane = main_loop.lane;
        const uint8_t* at = bytes + (unit - main_loop.unit_begin) * unit_columns + lane % 4 * 32;
        const auto* zeros = reinterpret_cast<const uint8_t*>(words);
#pragma unroll
        for (int first = 0; first < 4 * unit_sub_blocks; first += steps) {
          const bool mine =
              fragments::OneTokenSums<SLOT>::template is_mine<PartType::slots>(first / steps % PartType::slots, lane);
          const uint8_t* from = mine ? at + first / 4 * 128 + first % 4 * 8 : zeros;
#pragma unroll
          for (int step = 0; step < steps; step += 2) {
            uint32_t* to = &activation[first / 4][0][(first % 4 + step) * 2];
            if constexpr (steps > 1) {
              const uint4 four = *reinterpret_cast<const uint4*>(from + step * 8);
              to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
            } else {
              const uint2 two = *reinterpret_cast<const uint2*>(from);
              to[0] = two.x, to[1] = two.y;
            }
          }
        }
      },
      sums);
  stream::finish(main_loop, sums, reinterpret_cast<int*>(words) + 32, header, [&](int) { return scale.scale; });
}

// Dynamic shared memory: 64 bytes, [warp][TILES][NT * 128] sums.
template <int BITS, int SLOT, int NT, int TILES>
__global__ void __launch_bounds__(32 * gemv_warps, 1) lut_linear_few_tokens(const GemvProblem parameters) {
  const GemvProblem p = parameters;
  extern __shared__ uint4 shared[];
  int* sums = reinterpret_cast<int*>(shared + 4);
  using StreamType = stream::Stream<BITS, SLOT, NT, TILES>;
  StreamType main_loop(p);
  const uint4 header = fragments::load_weight(p.weight);
  const int sub_blocks = (p.units - 1) * unit_sub_blocks + p.tail_sub_blocks;
  main_loop.run(
      [&](int unit, uint32_t (&activation)[unit_sub_blocks][NT][8]) {
#pragma unroll
        for (int b = 0; b < unit_sub_blocks; ++b) {
          const int sub_block = unit * unit_sub_blocks + b;
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
            if (sub_block < sub_blocks) {
              const uint4* at =
                  p.fragments + (static_cast<int64_t>(t) * sub_blocks + sub_block) * 64 + threadIdx.x % 32;
              low = at[0];
              high = at[32];
            }
            activation[b][t][0] = low.x, activation[b][t][1] = low.y, activation[b][t][2] = low.z;
            activation[b][t][3] = low.w, activation[b][t][4] = high.x, activation[b][t][5] = high.y;
            activation[b][t][6] = high.z, activation[b][t][7] = high.w;
          }
        }
      },
      sums);
  stream::finish(main_loop, sums, reinterpret_cast<int*>(shared), header,
                 [&](int token) { return p.token_scales[token]; });
}

}  // namespace rcp::cuda
