// The order of a packed weight on a GPU, which every CUDA kernel of lut_linear streams. Plain C++ for host and device.
// The words are those of docs/kernels.md.
//
// A blob is a 128-byte header and then units, [row tile of 16 rows][unit of 512 columns]. A unit has 4 sub-blocks of
// 128 columns; the last unit of a row has 1 to 4. A unit consists of three areas, each a multiple of 128 bytes. A warp
// reads them in vectors of 16 bytes, lane l = 4 * gr + q:
//
//   codes   code_vectors(n) x [32 lanes][16 bytes], n the sub-blocks of the unit. A lane has 2 * bits words for each
//           sub-block; its vector c holds words 4c .. 4c + 3
//   tables  slots * levels / 16 x [16 rows][16 bytes]: the row's levels in the order slot, level
//   scales  slots / 4 x [8 gr][row gr, row gr + 8][4 slots] float16
//
// A slot is the place of a group in the unit: 512 / G slots for G = 32 or 64, else one in each sub-block. A group of
// more than 128 columns (G = in_features) repeats its table and scale in each of its sub-blocks. The areas of tables
// and scales always have the size of a full unit. Bytes beyond the rows, the columns or the groups are zero.
//
// Lane l owns rows gr and gr + 8, and the bytes of the A fragments of mma.m16n8k32.s8 over four k-steps s: register
// (r, h), byte j is row gr + 8r and column (within the sub-block)
//
//   G = 32   32s + 8q + 4h + j
//   G = 64   64(s / 2) + 16q + 8(s % 2) + 4h + j
//   others   32q + 8s + 4h + j
//
// A k-step therefore never leaves its group. The code of (s, r, h, j), with nibble = 16r + 4j, is
//
//   2 bits   word s, bits nibble + 2h ..
//   3 bits   i = 2(s % 2) + h. i < 3: word 3(s / 2) + i, bits nibble .. nibble + 2;
//            i = 3: bit b of the code is bit nibble + 3 of word 3(s / 2) + b
//   4 bits   word 2s + h, bits nibble .. nibble + 3
//
// A masked word then holds the selectors of two prmt. Three bits cost 10.5 integer operations for 16 weights, two bits
// cost 9; with a separate plane of high bits, three would cost 13.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RCP_HOST_DEVICE __host__ __device__
#else
#define RCP_HOST_DEVICE
#endif

namespace rcp {
namespace cuda {

inline constexpr char weight_magic[8] = {'R', 'C', 'P', 'C', 'U', 'D', 'A', '1'};
inline constexpr uint32_t weight_layout_version = 2;

// Every kernel reads the first 16 bytes, in one load.
struct WeightHeader {
  char magic[8];
  uint32_t shape_hash;  // CudaLayout::shape_hash()
  float tensor_scale;
  uint32_t bits;
  uint32_t group_size;
  int64_t rows, columns;
  uint32_t layout_version;
  uint32_t reserved[21];
};
static_assert(sizeof(WeightHeader) == 128, "the header keeps the units 128-byte aligned");

inline constexpr int tile_rows = 16, sub_block_columns = 128, unit_sub_blocks = 4, unit_columns = 512;

// Sizes and places that follow from (rows, columns, bits, group_size).
struct CudaLayout {
  int64_t rows, columns, group_size;
  int bits;

  RCP_HOST_DEVICE constexpr int levels() const { return 1 << bits; }
  RCP_HOST_DEVICE constexpr int64_t groups() const { return (columns + group_size - 1) / group_size; }
  // Bytes of a row of codes in the canonical format.
  RCP_HOST_DEVICE constexpr int64_t canonical_row_bytes() const { return (groups() * group_size * bits + 7) / 8; }

  RCP_HOST_DEVICE constexpr int64_t row_tiles() const { return (rows + tile_rows - 1) / tile_rows; }
  RCP_HOST_DEVICE constexpr int64_t sub_blocks() const { return (columns + sub_block_columns - 1) / sub_block_columns; }
  RCP_HOST_DEVICE constexpr int64_t units() const { return (sub_blocks() + unit_sub_blocks - 1) / unit_sub_blocks; }
  RCP_HOST_DEVICE constexpr int sub_blocks_of(int64_t unit) const {
    const int64_t left = sub_blocks() - unit * unit_sub_blocks;
    return left < unit_sub_blocks ? static_cast<int>(left) : unit_sub_blocks;
  }

  RCP_HOST_DEVICE constexpr int slot_columns() const {
    return group_size == 32 || group_size == 64 ? static_cast<int>(group_size) : 128;
  }
  RCP_HOST_DEVICE constexpr int slots() const { return unit_columns / slot_columns(); }
  // Vectors of codes that a lane has in a unit of n sub-blocks; 512 bytes a warp.
  RCP_HOST_DEVICE constexpr int code_vectors(int n) const { return (bits * n + 1) / 2; }
  RCP_HOST_DEVICE constexpr int table_bytes() const { return tile_rows * slots() * levels(); }
  RCP_HOST_DEVICE constexpr int scale_bytes() const { return tile_rows * slots() * 2; }

  // Within a unit of n sub-blocks.
  RCP_HOST_DEVICE constexpr int table_area(int n) const { return 512 * code_vectors(n); }
  RCP_HOST_DEVICE constexpr int scale_area(int n) const { return table_area(n) + table_bytes(); }
  RCP_HOST_DEVICE constexpr int unit_bytes(int n = unit_sub_blocks) const { return scale_area(n) + scale_bytes(); }

  RCP_HOST_DEVICE constexpr int64_t tile_bytes() const {
    return (units() - 1) * unit_bytes() + unit_bytes(sub_blocks_of(units() - 1));
  }
  RCP_HOST_DEVICE constexpr int64_t unit_offset(int64_t row_tile, int64_t unit) const {
    return static_cast<int64_t>(sizeof(WeightHeader)) + row_tile * tile_bytes() + unit * unit_bytes();
  }
  RCP_HOST_DEVICE constexpr int64_t total_bytes() const {
    return static_cast<int64_t>(sizeof(WeightHeader)) + row_tiles() * tile_bytes();
  }

  // Version, bits, group_size, rows and columns in one word. Blobs of different shapes may have the same size, so a
  // kernel compares this word of the header with the word of its launch. With the same version, bits and kind of group,
  // all shapes below 65536 x 65536 differ. Any other two shapes agree with a chance of 2^-32. For the layers of 18
  // sizes that were tried, with all bits and groups, no other shape has both the same size and the same hash (some of
  // them in tests/cuda/test_ptx_pack_weight.py).
  RCP_HOST_DEVICE constexpr uint32_t shape_hash() const {
    const uint32_t group = group_size == 32 ? 0 : group_size == 64 ? 1 : group_size == 128 ? 2 : 3;
    const uint32_t kind = (weight_layout_version * 8 + static_cast<uint32_t>(bits)) * 4 + group;
    return (static_cast<uint32_t>(rows) + (static_cast<uint32_t>(columns) << 16) +
            (static_cast<uint32_t>(columns) >> 16)) ^
           kind * 0x85ebca6bu;
  }

  // The group whose table and scale a slot of a unit holds. A slot past the last group is zero.
  RCP_HOST_DEVICE constexpr int64_t group_of(int64_t unit, int slot) const {
    return (unit * unit_columns + static_cast<int64_t>(slot) * slot_columns()) / group_size;
  }
  // Within the table area: level of (row 0..15, slot). Consecutive levels are consecutive bytes.
  RCP_HOST_DEVICE constexpr int table_offset(int row, int slot, int level) const {
    const int at = slot * levels() + level;
    return at / 16 * 256 + row * 16 + at % 16;
  }
  // Within the scale area: float16 of (row, slot).
  RCP_HOST_DEVICE constexpr int scale_offset(int row, int slot) const {
    return slot / 4 * 128 + row % 8 * 16 + row / 8 * 8 + slot % 4 * 2;
  }

  // Where a column (0..127) of a sub-block is in the fragments: s, q, h, j as above.
  struct FragmentPlace {
    int step, q, half, byte;
  };
  RCP_HOST_DEVICE constexpr FragmentPlace fragment_place(int column) const {
    const int half = column / 4 % 2, byte = column % 4;
    if (group_size == 32) return {column / 32, column / 8 % 4, half, byte};
    if (group_size == 64) return {column / 64 * 2 + column / 8 % 2, column / 16 % 4, half, byte};
    return {column / 8 % 4, column / 32, half, byte};
  }
  RCP_HOST_DEVICE constexpr int fragment_column(FragmentPlace at) const {
    const int low = 4 * at.half + at.byte;
    if (group_size == 32) return 32 * at.step + 8 * at.q + low;
    if (group_size == 64) return 64 * (at.step / 2) + 16 * at.q + 8 * (at.step % 2) + low;
    return 32 * at.q + 8 * at.step + low;
  }

  // Visits the bits of the code of (row 0..15, column 0..511 of the unit) within the code area:
  // f(byte offset of an aligned 32-bit word, bit in it, code bit it starts at, number of bits).
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f may be a host function
#endif
  template <class F>
  RCP_HOST_DEVICE constexpr void visit_code(int row, int column, const F& f) const {
    const FragmentPlace at = fragment_place(column % sub_block_columns);
    const int first = column / sub_block_columns * 2 * bits, nibble = 16 * (row / 8) + 4 * at.byte;
    const int lane = 4 * (row % 8) + at.q;
    const auto place = [&](int word) { return (first + word) / 4 * 512 + lane * 16 + (first + word) % 4 * 4; };
    if (bits == 2) {
      f(place(at.step), nibble + 2 * at.half, 0, 2);
    } else if (bits == 4) {
      f(place(2 * at.step + at.half), nibble, 0, 4);
    } else {
      const int i = 2 * (at.step % 2) + at.half, triple = at.step / 2 * 3;
      if (i < 3) {
        f(place(triple + i), nibble, 0, 3);
      } else {
        for (int b = 0; b < 3; ++b) f(place(triple + b), nibble + 3, b, 1);
      }
    }
  }
};

// The places within a unit, which depend on bits and group size alone. GROUP is 32, 64, 128, or 0 for one group a row.
template <int BITS, int GROUP>
RCP_HOST_DEVICE constexpr CudaLayout unit_layout() {
  return {0, 0, GROUP == 0 ? unit_columns : GROUP, BITS};
}

}  // namespace cuda
}  // namespace rcp
