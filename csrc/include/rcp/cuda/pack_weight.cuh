// The canonical packed weight (docs/format.md) into the GPU's order (weight_layout.h) and back, and the dense weight,
// on the device. All three take a thread block for each unit, and find a code by CudaLayout::visit_code: they cannot
// disagree about its place.
#pragma once

#include <cuda_runtime.h>

#include "rcp/cuda/values.cuh"
#include "rcp/cuda/weight_header.cuh"
#include "rcp/cuda/weight_layout.h"

namespace rcp::cuda {

struct PackWeightCall {
  const uint8_t* codes;    // [rows, canonical_row_bytes]
  const int8_t* levels;    // [rows, groups, 2^bits]
  const uint16_t* scales;  // float16 bits [rows, groups]
  float tensor_scale;
  uint8_t* blob;  // CudaLayout::total_bytes(), 16-byte aligned; every byte is written
  CudaLayout layout;
  cudaStream_t stream;
};

// The exact inverse. Codes of padding columns become 0. A blob with a wrong magic, version or shape gives the tensor
// scale NaN.
struct UnpackWeightCall {
  const uint8_t* blob;
  uint8_t* codes;
  int8_t* levels;
  uint16_t* scales;
  float* tensor_scale;  // [1], device memory
  CudaLayout layout;
  cudaStream_t stream;
};

// y[n, k] = tensor_scale * scale * level, exact in float32 (unless it leaves float32's range), rounded once to y_type.
// A blob with a wrong magic, version or shape gives NaN.
struct DequantizeCall {
  const uint8_t* blob;
  void* y;  // [rows, columns] of y_type, any alignment of its element
  FloatType y_type;
  CudaLayout layout;
  cudaStream_t stream;
};

namespace pack_weight_detail {

constexpr int threads = 256, unit_chunks = unit_columns / chunk_columns;

template <int BITS>
__device__ __forceinline__ CudaLayout with_bits(const CudaLayout& layout) {
  return {layout.rows, layout.columns, layout.group_size, BITS};
}

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
__global__ void __launch_bounds__(pack_weight_detail::threads) pack_weight_kernel(const PackWeightCall a) {
  namespace detail = pack_weight_detail;
  const CudaLayout layout = detail::with_bits<BITS>(a.layout);
  __shared__ uint4 shared[BITS * unit_sub_blocks / 2 * 32];
  auto* halves = reinterpret_cast<uint16_t*>(shared);
  const int64_t row_tile = blockIdx.x, unit = blockIdx.y;
  const int n = layout.sub_blocks_of(unit), code_bytes = layout.table_area(n);
  uint8_t* area = a.blob + layout.unit_offset(row_tile, unit);

  for (int i = threadIdx.x; i < code_bytes / 16; i += detail::threads) shared[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  // A thread has 16 codes of a row, two k-steps of a lane. They fill halves of words that no other thread touches.
  const int64_t row_bytes = layout.canonical_row_bytes();
  for (int i = threadIdx.x; i < tile_rows * n * 8; i += detail::threads) {
    const int row = i / (n * 8), sub_block = i / 8 % n, q = i / 2 % 4, pair = i % 2;
    const int64_t from_row = row_tile * tile_rows + row;
    if (from_row >= layout.rows) continue;
    const uint8_t* codes = a.codes + from_row * row_bytes;
    for (int c = 0; c < 16; ++c) {
      const int column =
          sub_block * sub_block_columns + layout.fragment_column({2 * pair + c / chunk_columns, q, c / 4 % 2, c % 4});
      const int64_t k = unit * unit_columns + column;
      if (k >= layout.columns) continue;
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
    // A slot past the last column becomes zeros.
    const bool there = from_row < layout.rows && unit * unit_columns + slot * layout.slot_columns() < layout.columns;
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
    header.shape_hash = layout.shape_hash();
    header.layout_version = weight_layout_version;
    header.tensor_scale = a.tensor_scale;
    header.bits = BITS;
    header.group_size = static_cast<uint32_t>(layout.group_size);
    header.rows = layout.rows;
    header.columns = layout.columns;
    *reinterpret_cast<WeightHeader*>(a.blob) = header;
  }
}

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) unpack_weight_kernel(const UnpackWeightCall a) {
  namespace detail = pack_weight_detail;
  const CudaLayout layout = detail::with_bits<BITS>(a.layout);
  const int64_t row_tile = blockIdx.x, unit = blockIdx.y;
  const int n = layout.sub_blocks_of(unit);
  const uint8_t* area = a.blob + layout.unit_offset(row_tile, unit);

  const int64_t row_bytes = layout.canonical_row_bytes();
  for (int i = threadIdx.x; i < tile_rows * n * 16; i += detail::threads) {
    const int chunk = i % (n * 16), row = i / (n * 16);
    const int64_t to_row = row_tile * tile_rows + row;
    if (to_row >= layout.rows) continue;
    uint32_t bytes = 0;
    for (int c = 0; c < chunk_columns; ++c) {
      const int column = chunk * chunk_columns + c;
      if (unit * unit_columns + column >= layout.columns) break;
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
    // Only the slot with the group's first column: the other slots of a long group hold the same.
    if (to_row >= layout.rows || k >= layout.columns || k != group * layout.group_size) continue;
    a.levels[(to_row * groups + group) * layout.levels() + level] =
        static_cast<int8_t>(tables[layout.table_offset(row, slot, level)]);
    if (level == 0) a.scales[to_row * groups + group] = scales[layout.scale_offset(row, slot) / 2];
  }
  if (row_tile == 0 && unit == 0 && threadIdx.x == 0) *a.tensor_scale = header_tensor_scale(a.blob, layout);
}

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) dequantize_kernel(const DequantizeCall a) {
  namespace detail = pack_weight_detail;
  const CudaLayout layout = detail::with_bits<BITS>(a.layout);
  const int64_t row_tile = blockIdx.x, unit = blockIdx.y;
  const int n = layout.sub_blocks_of(unit);
  const uint8_t* area = a.blob + layout.unit_offset(row_tile, unit);
  const auto* tables = reinterpret_cast<const int8_t*>(area + layout.table_area(n));
  const auto* scales = reinterpret_cast<const __half*>(area + layout.scale_area(n));
  const float tensor_scale = header_tensor_scale(a.blob, layout);

  for (int i = threadIdx.x; i < tile_rows * n * 16; i += detail::threads) {
    const int chunk = i % (n * 16), row = i / (n * 16), first = chunk * chunk_columns;
    const int64_t to_row = row_tile * tile_rows + row, k = unit * unit_columns + first;
    if (to_row >= layout.rows || k >= layout.columns) continue;
    const int slot = first / layout.slot_columns();
    const float scale = __half2float(scales[layout.scale_offset(row, slot) / 2]);
    float values[chunk_columns];
#pragma unroll
    for (int c = 0; c < chunk_columns; ++c) {
      const unsigned code = detail::read_code<BITS>(layout, area, row, first + c);
      const int level = tables[layout.table_offset(row, slot, static_cast<int>(code))];
      values[c] = __fmul_rn(__fmul_rn(scale, static_cast<float>(level)), tensor_scale);
    }
    const int64_t at = to_row * layout.columns + k;
    const bool whole = k + chunk_columns <= layout.columns;
    if (a.y_type == FloatType::float32) {
      float* y = static_cast<float*>(a.y) + at;
      if (whole && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
        reinterpret_cast<float4*>(y)[0] = make_float4(values[0], values[1], values[2], values[3]);
        reinterpret_cast<float4*>(y)[1] = make_float4(values[4], values[5], values[6], values[7]);
      } else {
#pragma unroll
        for (int c = 0; c < chunk_columns; ++c) {
          if (k + c < layout.columns) y[c] = values[c];
        }
      }
      continue;
    }
    uint16_t rounded[chunk_columns];
#pragma unroll
    for (int c = 0; c < chunk_columns; ++c) rounded[c] = two_byte_bits(values[c], a.y_type);
    uint16_t* y = static_cast<uint16_t*>(a.y) + at;
    if (whole && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = rounded[2 * w] | static_cast<uint32_t>(rounded[2 * w + 1]) << 16;
      *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int c = 0; c < chunk_columns; ++c) {
        if (k + c < layout.columns) y[c] = rounded[c];
      }
    }
  }
}

namespace pack_weight_detail {

template <class Call>
cudaError_t launch(void (*two)(Call), void (*three)(Call), void (*four)(Call), const Call& a) {
  const CudaLayout& layout = a.layout;
  if (layout.bits < 2 || layout.bits > 4 || layout.rows < 1 || layout.columns < 1) return cudaErrorInvalidValue;
  if (layout.row_tiles() > 0x7fffffff || layout.units() > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(layout.row_tiles()), static_cast<unsigned>(layout.units()));
  (layout.bits == 2 ? two : layout.bits == 3 ? three : four)<<<grid, threads, 0, a.stream>>>(a);
  return cudaGetLastError();
}

}  // namespace pack_weight_detail

inline cudaError_t pack_weight(const PackWeightCall& a) {
  return pack_weight_detail::launch(pack_weight_kernel<2>, pack_weight_kernel<3>, pack_weight_kernel<4>, a);
}

inline cudaError_t unpack_weight(const UnpackWeightCall& a) {
  return pack_weight_detail::launch(unpack_weight_kernel<2>, unpack_weight_kernel<3>, unpack_weight_kernel<4>, a);
}

inline cudaError_t dequantize(const DequantizeCall& a) {
  return pack_weight_detail::launch(dequantize_kernel<2>, dequantize_kernel<3>, dequantize_kernel<4>, a);
}

}  // namespace rcp::cuda
