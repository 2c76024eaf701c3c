// The canonical packed weight (docs/format.md) into the GPU's order (lut_linear_cuda_layout.h) and back, and the
// weight it stands for, on the device. All three walk [row tile][unit], a block each, and find a code by the layout's
// own visitor, so that they cannot disagree with it or with each other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "rcp/cuda/weight_header.cuh"
#include "rcp/cuda/weight_layout.h"
#include "rcp/float_types.h"

namespace rcp::cuda {

struct PackWeightArguments {
  const uint8_t* codes;    // [rows, canonical_row_bytes]
  const int8_t* levels;    // [rows, groups, 2^bits]
  const uint16_t* scales;  // float16 bits [rows, groups]
  float tensor_scale;
  uint8_t* blob;  // CudaLayout::total_bytes(), 16-byte aligned; every byte is written
  int64_t rows, columns, group_size;
  int bits;
  cudaStream_t stream;
};

// The exact inverse; codes of padding columns come back as 0. A blob of another magic, version or shape gives the
// tensor scale NaN.
struct UnpackWeightArguments {
  const uint8_t* blob;
  uint8_t* codes;
  int8_t* levels;
  uint16_t* scales;
  float* tensor_scale;  // [1], device memory
  int64_t rows, columns, group_size;
  int bits;
  cudaStream_t stream;
};

// y[n, k] = tensor_scale * scale * level, exact in float32 (unless it leaves float32's range), rounded once to y_type.
// A blob of another magic, version or shape gives NaN.
struct DequantizeArguments {
  const uint8_t* blob;
  void* y;  // [rows, columns] of y_type, any alignment of its element
  FloatType y_type;
  int64_t rows, columns, group_size;
  int bits;
  cudaStream_t stream;
};

namespace pack_weight_detail {

constexpr int threads = 256;

// A chunk is 8 neighbouring columns: one lane's share of a k-step.
constexpr int chunk_columns = 8, unit_chunks = unit_columns / chunk_columns;

template <int BITS>
__device__ __forceinline__ unsigned read_code(const CudaLayout& layout, const uint8_t* area, int row, int column) {
  unsigned code = 0;
  layout.visit_code(row, column, [&](int byte, int bit, int from, int count) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(area + byte));
    code |= ((word >> bit) & ((1u << count) - 1u)) << from;
  });
  return code;
}

}  // namespace pack_weight_detail

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) pack_weight_kernel(const PackWeightArguments a) {
  namespace detail = pack_weight_detail;
  const CudaLayout layout{a.rows, a.columns, a.group_size, BITS};
  __shared__ uint4 shared[BITS * unit_sub_blocks / 2 * 32];
  auto* halves = reinterpret_cast<uint16_t*>(shared);
  const int64_t row_tile = blockIdx.x, unit = blockIdx.y;
  const int n = layout.sub_blocks_of(unit), code_bytes = layout.table_area(n);
  uint8_t* area = a.blob + layout.unit_offset(row_tile, unit);

  for (int i = threadIdx.x; i < code_bytes / 16; i += detail::threads) shared[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  // A thread has 16 codes of a row, two k-steps of a lane: they fill halves of words that no other thread touches.
  const int64_t row_bytes = layout.canonical_row_bytes();
  for (int i = threadIdx.x; i < tile_rows * n * 8; i += detail::threads) {
    const int row = i / (n * 8), sub_block = i / 8 % n, q = i / 2 % 4, pair = i % 2;
    const int64_t from_row = row_tile * tile_rows + row;
    if (from_row >= a.rows) continue;
    const uint8_t* codes = a.codes + from_row * row_bytes;
    for (int c = 0; c < 16; ++c) {
      const int column = sub_block * sub_block_columns +
                         layout.fragment_column({2 * pair + c / detail::chunk_columns, q, c / 4 % 2, c % 4});
      const int64_t k = unit * unit_columns + column;
      if (k >= a.columns) continue;
      const int64_t byte = k * BITS / 8;
      const int shift = static_cast<int>(k * BITS % 8);
      unsigned window = __ldg(codes + byte);
      if (shift + BITS > 8) window |= static_cast<unsigned>(__ldg(codes + byte + 1)) << 8;
      const unsigned code = (window >> shift) & ((1u << BITS) - 1u);
      layout.visit_code(row, column, [&](int at, int bit, int first, int count) {
        uint16_t& half = halves[at / 2 + bit / 16];
        half = static_cast<uint16_t>(half | ((code >> first) & ((1u << count) - 1u)) << bit % 16);
      });
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < code_bytes / 16; i += detail::threads) reinterpret_cast<uint4*>(area)[i] = shared[i];

  const int64_t groups = layout.groups();
  const int slots = layout.slots();
  uint8_t* tables = area + layout.table_area(n);
  auto* scales = reinterpret_cast<uint16_t*>(area + layout.scale_area(n));
  for (int i = threadIdx.x; i < tile_rows * slots * layout.levels(); i += detail::threads) {
    const int level = i % layout.levels(), slot = i / layout.levels() % slots, row = i / layout.levels() / slots;
    const int64_t from_row = row_tile * tile_rows + row, group = layout.group_of(unit, slot);
    // Of a slot past the last column nothing is read, but its bytes are zero.
    const bool there = from_row < a.rows && unit * unit_columns + slot * layout.slot_columns() < a.columns;
    tables[layout.table_offset(row, slot, level)] =
        there ? static_cast<uint8_t>(__ldg(a.levels + (from_row * groups + group) * layout.levels() + level)) : 0;
    if (level == 0) {
      scales[layout.scale_offset(row, slot) / 2] = there ? __ldg(a.scales + from_row * groups + group) : 0;
    }
  }
  if (row_tile == 0 && unit == 0 && threadIdx.x == 0) {
    WeightHeader header{};
    for (int i = 0; i < 8; ++i)
      header.magic[i] = static_cast<char>((i < 4 ? weight_magic_low : weight_magic_high) >> (8 * (i % 4)));
    header.stamp = layout.stamp();
    header.layout_version = weight_layout_version;
    header.tensor_scale = a.tensor_scale;
    header.bits = BITS;
    header.group_size = static_cast<uint32_t>(a.group_size);
    header.rows = a.rows;
    header.columns = a.columns;
    *reinterpret_cast<WeightHeader*>(a.blob) = header;
  }
}

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) unpack_weight_kernel(const UnpackWeightArguments a) {
  namespace detail = pack_weight_detail;
  const CudaLayout layout{a.rows, a.columns, a.group_size, BITS};
  const int64_t row_tile = blockIdx.x, unit = blockIdx.y;
  const int n = layout.sub_blocks_of(unit);
  const uint8_t* area = a.blob + layout.unit_offset(row_tile, unit);

  const int64_t row_bytes = layout.canonical_row_bytes();
  for (int i = threadIdx.x; i < tile_rows * n * 16; i += detail::threads) {
    const int chunk = i % (n * 16), row = i / (n * 16);
    const int64_t to_row = row_tile * tile_rows + row;
    if (to_row >= a.rows) continue;
    uint32_t bytes = 0;
    for (int c = 0; c < detail::chunk_columns; ++c) {
      const int column = chunk * detail::chunk_columns + c;
      if (unit * unit_columns + column >= a.columns) break;
      bytes |= detail::read_code<BITS>(layout, area, row, column) << (BITS * c);
    }
    const int64_t first = (unit * detail::unit_chunks + chunk) * BITS;
    for (int b = 0; b < BITS; ++b) {
      if (first + b < row_bytes) a.codes[to_row * row_bytes + first + b] = static_cast<uint8_t>(bytes >> (8 * b));
    }
  }

  const int64_t groups = layout.groups();
  const int slots = layout.slots();
  const uint8_t* tables = area + layout.table_area(n);
  const auto* scales = reinterpret_cast<const uint16_t*>(area + layout.scale_area(n));
  for (int i = threadIdx.x; i < tile_rows * slots * layout.levels(); i += detail::threads) {
    const int level = i % layout.levels(), slot = i / layout.levels() % slots, row = i / layout.levels() / slots;
    const int64_t to_row = row_tile * tile_rows + row, group = layout.group_of(unit, slot);
    const int64_t k = unit * unit_columns + slot * layout.slot_columns();
    // The slot with a group's first column; others of a long group hold the same.
    if (to_row >= a.rows || k >= a.columns || k != group * a.group_size) continue;
    a.levels[(to_row * groups + group) * layout.levels() + level] =
        static_cast<int8_t>(tables[layout.table_offset(row, slot, level)]);
    if (level == 0) a.scales[to_row * groups + group] = scales[layout.scale_offset(row, slot) / 2];
  }
  if (row_tile == 0 && unit == 0 && threadIdx.x == 0)
    *a.tensor_scale = header_tensor_scale(a.blob, BITS, a.group_size, a.rows, a.columns);
}

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) dequantize_kernel(const DequantizeArguments a) {
  namespace detail = pack_weight_detail;
  const CudaLayout layout{a.rows, a.columns, a.group_size, BITS};
  const int64_t row_tile = blockIdx.x, unit = blockIdx.y;
  const int n = layout.sub_blocks_of(unit);
  const uint8_t* area = a.blob + layout.unit_offset(row_tile, unit);
  const auto* tables = reinterpret_cast<const int8_t*>(area + layout.table_area(n));
  const auto* scales = reinterpret_cast<const __half*>(area + layout.scale_area(n));
  const float tensor_scale = header_tensor_scale(a.blob, BITS, a.group_size, a.rows, a.columns);

  for (int i = threadIdx.x; i < tile_rows * n * 16; i += detail::threads) {
    const int chunk = i % (n * 16), row = i / (n * 16), first = chunk * detail::chunk_columns;
    const int64_t to_row = row_tile * tile_rows + row, k = unit * unit_columns + first;
    if (to_row >= a.rows || k >= a.columns) continue;
    const int slot = first / layout.slot_columns();
    const float scale = __half2float(scales[layout.scale_offset(row, slot) / 2]);
    float values[detail::chunk_columns];
#pragma unroll
    for (int c = 0; c < detail::chunk_columns; ++c) {
      const unsigned code = detail::read_code<BITS>(layout, area, row, first + c);
      const int level = tables[layout.table_offset(row, slot, static_cast<int>(code))];
      values[c] = __fmul_rn(__fmul_rn(scale, static_cast<float>(level)), tensor_scale);
    }
    const int64_t at = to_row * a.columns + k;
    const bool whole = k + detail::chunk_columns <= a.columns;
    if (a.y_type == FloatType::float32) {
      float* y = static_cast<float*>(a.y) + at;
      if (whole && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
        reinterpret_cast<float4*>(y)[0] = make_float4(values[0], values[1], values[2], values[3]);
        reinterpret_cast<float4*>(y)[1] = make_float4(values[4], values[5], values[6], values[7]);
      } else {
#pragma unroll
        for (int c = 0; c < detail::chunk_columns; ++c) {
          if (k + c < a.columns) y[c] = values[c];
        }
      }
      continue;
    }
    uint16_t rounded[detail::chunk_columns];
#pragma unroll
    for (int c = 0; c < detail::chunk_columns; ++c) {
      rounded[c] = a.y_type == FloatType::float16 ? __half_as_ushort(__float2half_rn(values[c]))
                                                  : __bfloat16_as_ushort(__float2bfloat16_rn(values[c]));
    }
    uint16_t* y = static_cast<uint16_t*>(a.y) + at;
    if (whole && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = rounded[2 * w] | static_cast<uint32_t>(rounded[2 * w + 1]) << 16;
      *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int c = 0; c < detail::chunk_columns; ++c) {
        if (k + c < a.columns) y[c] = rounded[c];
      }
    }
  }
}

namespace pack_weight_detail {

template <class Arguments>
cudaError_t launch(void (*two)(Arguments), void (*three)(Arguments), void (*four)(Arguments), const Arguments& a) {
  const CudaLayout layout{a.rows, a.columns, a.group_size, a.bits};
  if (a.bits < 2 || a.bits > 4 || a.rows < 1 || a.columns < 1) return cudaErrorInvalidValue;
  if (layout.row_tiles() > 0x7fffffff || layout.units() > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(layout.row_tiles()), static_cast<unsigned>(layout.units()));
  (a.bits == 2 ? two : a.bits == 3 ? three : four)<<<grid, threads, 0, a.stream>>>(a);
  return cudaGetLastError();
}

}  // namespace pack_weight_detail

inline cudaError_t pack_weight(const PackWeightArguments& a) {
  return pack_weight_detail::launch(pack_weight_kernel<2>, pack_weight_kernel<3>, pack_weight_kernel<4>, a);
}

inline cudaError_t unpack_weight(const UnpackWeightArguments& a) {
  return pack_weight_detail::launch(unpack_weight_kernel<2>, unpack_weight_kernel<3>, unpack_weight_kernel<4>, a);
}

inline cudaError_t dequantize(const DequantizeArguments& a) {
  return pack_weight_detail::launch(dequantize_kernel<2>, dequantize_kernel<3>, dequantize_kernel<4>, a);
}

}  // namespace rcp::cuda
