"""The CUDA blob of a weight, packed by numpy from the description in csrc/include/rcp/cuda/weight_layout.h."""

import numpy as np

from rcp_kernels.formats import PackedWeight


def shape_hash(rows, columns, group, bits):
    """The header's hash of shapes, which may be arrays. group is 32, 64, 128 or anything else for one group a row."""
    kind = (2 * 8 + bits) * 4 + {32: 0, 64: 1, 128: 2}.get(group, 3)
    return (rows + columns * 65536 + columns // 65536) % 2**32 ^ kind * 0x85EBCA6B % 2**32


def pack(weight: PackedWeight) -> np.ndarray:
    """The blob, uint8."""
    bits, group, rows, columns = weight.bits, weight.group_size, weight.out_features, weight.in_features
    tiles, sub_blocks = -(-rows // 16), -(-columns // 128)
    slot_columns = group if group in (32, 64) else 128
    slots, levels = 512 // slot_columns, 1 << bits
    codes = np.zeros((tiles * 16, -(-sub_blocks // 4) * 512), np.uint32)
    codes[:rows, :columns] = weight.unpack().numpy()
    header = np.zeros(128, np.uint8)
    header[:8] = np.frombuffer(b"RCPCUDA1", np.uint8)
    header[8:12] = np.array([shape_hash(rows, columns, group, bits)], np.uint32).view(np.uint8)
    header[12:16] = np.array([float(weight.tensor_scale)], np.float32).view(np.uint8)
    header[16:24] = np.array([bits, group], np.uint32).view(np.uint8)
    header[24:40] = np.array([rows, columns], np.int64).view(np.uint8)
    header[40:44] = np.array([2], np.uint32).view(np.uint8)
    areas = [header]
    for tile in range(tiles):
        for unit in range(-(-sub_blocks // 4)):
            n = min(4, sub_blocks - 4 * unit)
            words = np.zeros((8, 4, n, 2 * bits), np.uint32)  # gr, q, sub-block, word
            for s, h, j, r, q in np.ndindex(4, 2, 4, 2, 4):
                if group == 32:
                    column = 32 * s + 8 * q + 4 * h + j
                elif group == 64:
                    column = 64 * (s // 2) + 16 * q + 8 * (s % 2) + 4 * h + j
                else:
                    column = 32 * q + 8 * s + 4 * h + j
                first = unit * 512 + column
                code = codes[tile * 16 + 8 * r : tile * 16 + 8 * r + 8, first : first + 128 * (n - 1) + 1 : 128]
                nibble = np.uint32(16 * r + 4 * j)
                if bits == 2:
                    words[:, q, :, s] |= code << (nibble + np.uint32(2 * h))
                elif bits == 4:
                    words[:, q, :, 2 * s + h] |= code << nibble
                elif 2 * (s % 2) + h < 3:
                    words[:, q, :, 3 * (s // 2) + 2 * (s % 2) + h] |= code << nibble
                else:
                    for b in range(3):
                        words[:, q, :, 3 * (s // 2) + b] |= ((code >> np.uint32(b)) & 1) << (nibble + np.uint32(3))
            per_lane = words.reshape(32, n * 2 * bits)
            per_lane = np.pad(per_lane, ((0, 0), (0, -per_lane.shape[1] % 4)))
            areas.append(per_lane.reshape(32, -1, 4).transpose(1, 0, 2).ravel().view(np.uint8))
            tables = np.zeros((16, slots, levels), np.int8)
            scales = np.zeros((16, slots), np.float16)
            for slot in range(slots):
                column = unit * 512 + slot * slot_columns
                if column < columns:
                    here = min(16, rows - tile * 16)
                    tables[:here, slot] = weight.levels[tile * 16 : tile * 16 + here, column // group].numpy()
                    scales[:here, slot] = weight.scales[tile * 16 : tile * 16 + here, column // group].numpy()
            areas.append(tables.reshape(16, -1, 16).transpose(1, 0, 2).ravel().view(np.uint8))
            areas.append(scales.reshape(2, 8, slots // 4, 4).transpose(2, 1, 0, 3).ravel().view(np.uint8))
    return np.concatenate(areas)
