// GPTQ's inner loop (Frantar et al. 2023). The columns of one group are rounded one after the other, each row to its
// own table. The error of a column changes the columns after it, to the end of the block.
//
//   q_j = nearest level of w_j      e_j = (w_j - q_j) * (1 / U_jj)      w_k -= e_j * U_jk      for k > j
//
// Every product and every sum is rounded to float32, in this order. The result is the same on every CPU and with any
// number of threads.
#pragma once

#include <cstring>

#include "rcp/cpu/lanes.h"
#include "rcp/cpu/parallel.h"
#include "rcp/cpu/scratch.h"

namespace rcp {

struct GptqRoundKernel {
  int64_t lanes;
  void (*tile)(float* weights, int64_t columns, int64_t rounded, const float* upper, int64_t stride,
               const float* bounds, const float* table, int levels, uint8_t* codes, float* errors);
};

}  // namespace rcp

#define RCP_KERNELS "rcp/cpu/gptq_round_vector.h"
#include "rcp/cpu/each_isa.h"

namespace rcp {

struct GptqRound {
  float* block;        // [rows, columns]; the columns after `first` are changed
  int64_t row_stride;  // of block
  const float* upper;  // [columns, columns], upper triangular
  int64_t upper_stride;
  const float* table;  // [rows, levels], ascending
  int64_t rows, columns, first, last;
  int levels;
  uint8_t* codes;  // [rows, last - first]
  float* errors;   // [rows, last - first]
};

inline void gptq_round(const GptqRound& a, Isa isa, const ThreadPool& pool) {
  const GptqRoundKernel& kernel = RCP_FOR_ISA(isa, gptq_round_kernel);
  const int64_t lanes = kernel.lanes, wide = a.columns - a.first, rounded = a.last - a.first;
  if (rounded == 0) return;
  // A weight costs about a nanosecond, so a second thread pays from about 20 us on.
  const bool small = a.rows * wide < (1 << 14);
  const int64_t tiles = (a.rows + lanes - 1) / lanes;
  parallel_pieces(pool.serial_if(small), tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size_of<float>(wide * lanes) + Scratch::size_of<float>(rounded * lanes) +
                    Scratch::size_of<uint8_t>(rounded * lanes) + 2 * Scratch::size_of<float>(a.levels * lanes));
    float* weights = scratch.take<float>(wide * lanes);
    float* errors = scratch.take<float>(rounded * lanes);
    uint8_t* codes = scratch.take<uint8_t>(rounded * lanes);
    float* table = scratch.take<float>(a.levels * lanes);
    float* bounds = scratch.take<float>(a.levels * lanes);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t top = tile * lanes, used = std::min(lanes, a.rows - top);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t row = top + std::min(lane, used - 1);
        const float* from = a.block + row * a.row_stride + a.first;
        for (int64_t k = 0; k < wide; ++k) weights[k * lanes + lane] = from[k];
        const float* levels = a.table + row * a.levels;
        for (int c = 0; c < a.levels; ++c) table[c * lanes + lane] = levels[c];
        // Halved first: the sum of two levels could overflow.
        for (int c = 0; c + 1 < a.levels; ++c) bounds[c * lanes + lane] = levels[c + 1] * 0.5f + levels[c] * 0.5f;
      }
      kernel.tile(weights, wide, rounded, a.upper + a.first * a.upper_stride + a.first, a.upper_stride, bounds, table,
                  a.levels, codes, errors);
      for (int64_t lane = 0; lane < used; ++lane) {
        const int64_t row = top + lane;
        float* to = a.block + row * a.row_stride + a.first;
        for (int64_t k = 0; k < wide; ++k) to[k] = weights[k * lanes + lane];
        for (int64_t j = 0; j < rounded; ++j) {
          a.codes[row * rounded + j] = codes[j * lanes + lane];
          a.errors[row * rounded + j] = errors[j * lanes + lane];
        }
      }
    }
  });
}

}  // namespace rcp
