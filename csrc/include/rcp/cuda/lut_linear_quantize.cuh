// Tokens -> B fragments and scales, for the kernels of lut_linear that multiply several tokens: rotates (optional),
// quantizes, and stores in the order in which a lane of mma.m16n8k32.s8 wants its operands, so that they are loaded in
// whole 16-byte pieces and never rearranged again.
//
//   fragments [token tile of 8][sub-block of 128 columns][2][32 lanes][16 bytes]: lane 4 * token + q, k-steps 0 and 1
//   in the first half, 2 and 3 in the second, a k-step being 8 bytes [h][j]: lut_linear_cuda_layout.h
//
// Columns and tokens that do not exist are zeros.
#pragma once

#include "rcp/cuda/lut_linear_activation.cuh"

namespace rcp::cuda {

struct QuantizeTokensProblem {
  const void* x;
  FloatType x_type;
  uint8_t* fragments;
  float* scales;  // [tokens]
  int64_t tokens;
  int columns, sub_blocks;
  float clip, qmax, qmax_inverse, qmax_inverse_high, qmax_inverse_low;  // as in GemvProblem
  int rotation_group;                                                   // 0, 32, 64, 128: a divisor of columns
  bool sequency;
};

inline constexpr int quantize_tokens_threads = 256;

// TYPE of the kernels that quantize, which is otherwise that of x: x may be anything. With a type, a token is 4096
// columns, 16-byte aligned and not clipped: two pieces a thread, quantized without loops or questions.
inline constexpr int any_type = -1;

// One block per token, padding tokens of the last tile included. SLOT as in Part: 32, 64, or any other for 128 and
// more. With a TYPE there is no rotation either.
template <int SLOT, int TYPE>
__global__ void __launch_bounds__(quantize_tokens_threads) lut_linear_quantize_tokens(const QuantizeTokensProblem p) {
  __shared__ uint32_t words[activation::block_max_words];
  __shared__ uint2 exchange[quantize_tokens_threads];
  const int64_t token = blockIdx.x;
  const int pieces = p.sub_blocks * 16;
  uint8_t* to = p.fragments + token / 8 * p.sub_blocks * 1024 + token % 8 * 64;
  const auto place = [&](int piece) {
    const int q = activation::piece_offset<SLOT>(piece % 16) / 32,
              step = activation::piece_offset<SLOT>(piece % 16) / 8 % 4;
    return reinterpret_cast<uint2*>(to + piece / 16 * 1024 + step / 2 * 512 + q * 16 + step % 2 * 8);
  };
  if (token >= p.tokens) {
    for (int piece = threadIdx.x; piece < pieces; piece += quantize_tokens_threads) *place(piece) = {0, 0};
    return;
  }
  if constexpr (TYPE != any_type) {
    constexpr auto type = static_cast<FloatType>(TYPE);
    constexpr int two = 2 * quantize_tokens_threads, bytes = two * 8 * (type == FloatType::float32 ? 4 : 2);
    const void* x = static_cast<const char*>(p.x) + token * bytes;
    activation::prepare_block_max(words);
    const auto low = activation::load_whole_piece<type>(x, threadIdx.x);
    const auto high = activation::load_whole_piece<type>(x, threadIdx.x, quantize_tokens_threads);
    const auto scale = activation::scale_of_two<type>(low, high, words, threadIdx.x / 32, threadIdx.x % 32, p.qmax,
                                                      p.qmax_inverse, p.qmax_inverse_high, p.qmax_inverse_low);
    if (threadIdx.x == 0) p.scales[token] = scale.scale;
    *place(threadIdx.x) = activation::round_piece(low, scale.reciprocal, p.qmax);
    // 256 pieces are 16 sub-blocks.
    place(threadIdx.x)[quantize_tokens_threads / 16 * 1024 / sizeof(uint2)] =
        activation::round_piece(high, scale.reciprocal, p.qmax);
    return;
  }
  const char* x = static_cast<const char*>(p.x) + token * p.columns * (p.x_type == FloatType::float32 ? 4 : 2);
  activation::TokenScale scale{};
  const auto load = [&](int piece, float (&values)[8]) {
    activation::load_piece(x, p.x_type, piece, p.columns, values);
    if (p.rotation_group) activation::rotate(values, p.x_type, p.rotation_group);
  };
  const auto store = [&](int piece, const float (&values)[8]) {
    uint2 rounded = activation::round_piece(values, scale.reciprocal, p.clip < 1.0f, p.qmax);
    if (p.rotation_group && p.sequency) {
      // The bytes change places within their run: through the warp's part of shared memory.
      auto* bytes = reinterpret_cast<uint8_t*>(exchange) + threadIdx.x / 32 * 256;
      const int bits = p.rotation_group == 32 ? 5 : p.rotation_group == 64 ? 6 : 7;
      const int first = threadIdx.x % 32 * 8, run = first & -p.rotation_group;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = i < 4 ? rounded.x : rounded.y;
        bytes[run + activation::sequency_of(first - run + i, bits)] = static_cast<uint8_t>(word >> (i % 4 * 8));
      }
      __syncwarp();
      rounded = exchange[threadIdx.x];
    }
    if (piece < pieces) *place(piece) = rounded;
  };
  // A warp's pieces, 256 columns, are whole runs of any rotation_group, and all its lanes take part in the shuffles.
  // The first two of a thread, 4096 columns a token, stay in registers; the rest is read and rotated twice.
  constexpr int kept = 2;
  const int rounded = (pieces + 31) / 32 * 32;
  uint32_t largest = 0;
  float first[kept][8];
#pragma unroll
  for (int i = 0; i < kept; ++i) {
    const int piece = threadIdx.x + i * quantize_tokens_threads;
    if (piece < rounded) {
      load(piece, first[i]);
      largest = activation::largest_of(first[i], largest);
    }
  }
#pragma unroll 1
  for (int piece = threadIdx.x + kept * quantize_tokens_threads; piece < rounded; piece += quantize_tokens_threads) {
    float values[8];
    load(piece, values);
    largest = activation::largest_of(values, largest);
  }
  const float amax = activation::block_max<FloatType::float32>(largest, words, threadIdx.x / 32, threadIdx.x % 32);
  scale = activation::token_scale(amax, p.clip, p.qmax, p.qmax_inverse);
  if (threadIdx.x == 0) p.scales[token] = scale.scale;
#pragma unroll
  for (int i = 0; i < kept; ++i) {
    const int piece = threadIdx.x + i * quantize_tokens_threads;
    if (piece < rounded) store(piece, first[i]);
  }
#pragma unroll 1
  for (int piece = threadIdx.x + kept * quantize_tokens_threads; piece < rounded; piece += quantize_tokens_threads) {
    float values[8];
    load(piece, values);
    store(piece, values);
  }
}

}  // namespace rcp::cuda
