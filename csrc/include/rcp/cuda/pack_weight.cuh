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

constexpr int threads = 256;

// The unit of a thread block: blockIdx is (row tile, unit).
template <int BITS>
struct UnitOfBlock {
  CudaLayout layout;
  int64_t first_row, first_column;
  int n;  // sub-blocks
  int64_t offset;

  __device__ __forceinline__ explicit UnitOfBlock(const CudaLayout& shape)
      : layout{shape.rows, shape.columns, shape.group_size, BITS},
        first_row(int64_t{blockIdx.x} * tile_rows),
        first_column(int64_t{blockIdx.y} * unit_columns),
        n(layout.sub_blocks_of(blockIdx.y)),
        offset(layout.unit_offset(blockIdx.x, blockIdx.y)) {}

  __device__ __forceinline__ bool is_first_thread() const {
    return blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0;
  }
  // f(row 0..15, chunk of the unit) for the rows that exist.
  template <class F>
  __device__ __forceinline__ void visit_chunks(const F& f) const {
    for (int i = threadIdx.x; i < tile_rows * n * 16; i += threads) {
      if (first_row + i / (n * 16) < layout.rows) f(i / (n * 16), i % (n * 16));
    }
  }
  // f(row 0..15, slot, level, place, k) for all levels. `place` is row * groups + group in the canonical tensors, k the
  // slot's first column; place is -1 where the row or the column does not exist.
  template <class F>
  __device__ __forceinline__ void visit_levels(const F& f) const {
    const int levels = layout.levels(), slots = layout.slots();
    for (int i = threadIdx.x; i < tile_rows * slots * levels; i += threads) {
      const int level = i % levels, slot = i / levels % slots, row = i / levels / slots;
      const int64_t n_row = first_row + row, k = first_column + slot * layout.slot_columns();
      const bool exists = n_row < layout.rows && k < layout.columns;
      f(row, slot, level, exists ? n_row * layout.groups() + layout.group_of(blockIdx.y, slot) : -1, k);
    }
  }
};

template <int BITS>
__device__ __forceinline__ unsigned read_code(const CudaLayout& layout, const uint8_t* unit, int row, int column) {
  unsigned code = 0;
  layout.visit_code(row, column, [&](int byte, int bit, int from, int count) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(unit + byte));
    code |= ((word >> bit) & ((1u << count) - 1u)) << from;
  });
  return code;
}

// The canonical codes of the unit into `halves`, its code area in shared memory. A thread has 16 codes of a row, two
// k-steps of a lane. They fill halves of words that no other thread touches.
template <int BITS>
__device__ __forceinline__ void pack_codes(const UnitOfBlock<BITS>& unit, const uint8_t* all_codes, uint16_t* halves) {
  const CudaLayout& layout = unit.layout;
  for (int i = threadIdx.x; i < tile_rows * unit.n * 8; i += threads) {
    const int row = i / (unit.n * 8), sub_block = i / 8 % unit.n, q = i / 2 % 4, pair = i % 2;
    if (unit.first_row + row >= layout.rows) continue;
    const uint8_t* codes = all_codes + (unit.first_row + row) * layout.canonical_row_bytes();
    for (int c = 0; c < 16; ++c) {
      const int column =
          sub_block * sub_block_columns + layout.fragment_column({2 * pair + c / chunk_columns, q, c / 4 % 2, c % 4});
      const int64_t k = unit.first_column + column;
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
}

}  // namespace pack_weight_detail

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) pack_weight_kernel(const PackWeightCall a) {
  namespace detail = pack_weight_detail;
  const detail::UnitOfBlock<BITS> unit(a.layout);
  const CudaLayout& layout = unit.layout;
  __shared__ uint4 shared[BITS * unit_sub_blocks / 2 * 32];
  const int code_vectors = layout.table_area(unit.n) / 16;
  uint8_t* to = a.blob + unit.offset;

  for (int i = threadIdx.x; i < code_vectors; i += detail::threads) shared[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  detail::pack_codes(unit, a.codes, reinterpret_cast<uint16_t*>(shared));
  __syncthreads();
  for (int i = threadIdx.x; i < code_vectors; i += detail::threads) reinterpret_cast<uint4*>(to)[i] = shared[i];

  uint8_t* tables = to + layout.table_area(unit.n);
  auto* scales = reinterpret_cast<uint16_t*>(to + layout.scale_area(unit.n));
  unit.visit_levels([&](int row, int slot, int level, int64_t place, int64_t) {
    tables[layout.table_offset(row, slot, level)] =
        place < 0 ? 0 : static_cast<uint8_t>(__ldg(a.levels + place * layout.levels() + level));
    if (level == 0) scales[layout.scale_offset(row, slot) / 2] = place < 0 ? 0 : __ldg(a.scales + place);
  });
  if (!unit.is_first_thread()) return;
  WeightHeader header{};
  for (int i = 0; i < 8; ++i) {
    header.magic[i] = static_cast<char>((i < 4 ? weight_magic_low : weight_magic_high) >> (8 * (i % 4)));
  }
  header.shape_hash = layout.shape_hash();
  header.layout_version = weight_layout_version;
  header.tensor_scale = a.tensor_scale;
  header.bits = BITS;
  header.group_size = static_cast<uint32_t>(layout.group_size);
  header.rows = layout.rows;
  header.columns = layout.columns;
  *reinterpret_cast<WeightHeader*>(a.blob) = header;
}

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) unpack_weight_kernel(const UnpackWeightCall a) {
  namespace detail = pack_weight_detail;
  const detail::UnitOfBlock<BITS> unit(a.layout);
  const CudaLayout& layout = unit.layout;
  const uint8_t* from = a.blob + unit.offset;

  const int64_t row_bytes = layout.canonical_row_bytes();
  unit.visit_chunks([&](int row, int chunk) {
    uint32_t bytes = 0;
    for (int c = 0; c < chunk_columns; ++c) {
      const int column = chunk * chunk_columns + c;
      if (unit.first_column + column >= layout.columns) break;
      bytes |= detail::read_code<BITS>(layout, from, row, column) << (BITS * c);
    }
    const int64_t first = (unit.first_column / chunk_columns + chunk) * BITS;
    for (int b = 0; b < BITS; ++b) {
      if (first + b < row_bytes) {
        a.codes[(unit.first_row + row) * row_bytes + first + b] = static_cast<uint8_t>(bytes >> (8 * b));
      }
    }
  });

  const uint8_t* tables = from + layout.table_area(unit.n);
  const auto* scales = reinterpret_cast<const uint16_t*>(from + layout.scale_area(unit.n));
  unit.visit_levels([&](int row, int slot, int level, int64_t place, int64_t k) {
    // Only the slot with the group's first column: the other slots of a long group hold the same.
    if (place < 0 || k % layout.group_size != 0) return;
    a.levels[place * layout.levels() + level] = static_cast<int8_t>(tables[layout.table_offset(row, slot, level)]);
    if (level == 0) a.scales[place] = scales[layout.scale_offset(row, slot) / 2];
  });
  if (unit.is_first_thread()) *a.tensor_scale = header_tensor_scale(a.blob, layout);
}

template <int BITS>
__global__ void __launch_bounds__(pack_weight_detail::threads) dequantize_kernel(const DequantizeCall a) {
  namespace detail = pack_weight_detail;
  const detail::UnitOfBlock<BITS> unit(a.layout);
  const CudaLayout& layout = unit.layout;
  const uint8_t* from = a.blob + unit.offset;
  const auto* tables = reinterpret_cast<const int8_t*>(from + layout.table_area(unit.n));
  const auto* scales = reinterpret_cast<const __half*>(from + layout.scale_area(unit.n));
  const float tensor_scale = header_tensor_scale(a.blob, layout);
  const int64_t y_row_bytes = layout.columns * (a.y_type == FloatType::float32 ? 4 : 2);

  unit.visit_chunks([&](int row, int chunk) {
    const int first = chunk * chunk_columns, slot = first / layout.slot_columns();
    const float scale = __half2float(scales[layout.scale_offset(row, slot) / 2]);
    float values[chunk_columns];
#pragma unroll
    for (int c = 0; c < chunk_columns; ++c) {
      const unsigned code = detail::read_code<BITS>(layout, from, row, first + c);
      const int level = tables[layout.table_offset(row, slot, static_cast<int>(code))];
      values[c] = __fmul_rn(__fmul_rn(scale, static_cast<float>(level)), tensor_scale);
    }
    char* y = static_cast<char*>(a.y) + (unit.first_row + row) * y_row_bytes;
    store_chunk(y, a.y_type, unit.first_column + first, layout.columns, values);
  });
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
