"""The stored form of a quantized weight (docs/format.md)."""

from .codes import (
    BITS,
    GROUP_SIZES,
    MAX_GROUP_SIZE,
    Geometry,
    check_bits,
    check_group_size,
    num_groups,
    pack_codes,
    row_bytes,
    unpack_codes,
)
from .header import FORMAT_VERSION, INPUT_ORDER_VERSION, KINDS, kind_version, make_header
from .imported_weight import ImportedWeight
from .levels import LARGEST_SCALE_EXPONENT, LEVEL_MAX, check_ascending, snap_levels, tensor_scale_exponent, uniform_step
from .packed_weight import PackedWeight, check_input_order, merge_rows

__all__ = [
    "BITS",
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "INPUT_ORDER_VERSION",
    "KINDS",
    "LARGEST_SCALE_EXPONENT",
    "LEVEL_MAX",
    "MAX_GROUP_SIZE",
    "Geometry",
    "ImportedWeight",
    "PackedWeight",
    "check_ascending",
    "check_bits",
    "check_group_size",
    "check_input_order",
    "kind_version",
    "make_header",
    "merge_rows",
    "num_groups",
    "pack_codes",
    "row_bytes",
    "snap_levels",
    "tensor_scale_exponent",
    "uniform_step",
    "unpack_codes",
]
