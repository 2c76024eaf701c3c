"""``format``, the tensor that says how a stored weight is packed, and its versions (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Geometry

__all__ = ["FORMAT_VERSION", "INPUT_ORDER_VERSION", "KINDS", "kind_version", "make_header", "read_header"]

FORMAT_VERSION = 3
"""The newest version that this package reads. A weight is written in the lowest version that can express it."""

INPUT_ORDER_VERSION = 3
"""The version that brought ``input_order``. Weights of this version have one; weights of earlier versions have none."""

KINDS = ("table", "uniform")
"""Which levels a group stores: all, or the first of an arithmetic progression. ``format`` stores the index. A version
has the kinds ``KINDS[:version]``."""


def kind_version(kind: str) -> int:
    """The format version that brought a kind of :data:`KINDS`."""
    return KINDS.index(kind) + 1


def make_header(version: int, kind: str, geometry: Geometry) -> Tensor:
    """``format`` of a stored weight, int64 [5], or [6] from version 2 on."""
    kinds = [KINDS.index(kind)] if version > 1 else []
    rows, columns, bits, group_size = geometry
    return torch.tensor([version, bits, group_size, columns, rows, *kinds], dtype=torch.int64, device="cpu")


def read_header(header: object) -> tuple[int, str, Geometry]:
    """Version, kind and geometry of a stored weight.

    Raises:
        ValueError: ``format`` is damaged, has no values, or is of a later version.
    """
    rule = "PackedWeight: format must be int64 [version, bits, group_size, in_features, out_features]"
    if not isinstance(header, Tensor):
        raise ValueError(f"{rule}, got {type(header).__name__}; store it as the tensor that state_dict gave")
    if header.dtype != torch.int64 or header.dim() != 1 or header.numel() < 1:
        raise ValueError(f"{rule}, got {header.dtype} of shape {tuple(header.shape)}; store it unconverted")
    if header.is_meta:
        raise ValueError(f"{rule}, got a tensor on the meta device, which has no values; load it on the CPU")
    version, *fields = (int(value) for value in header.tolist())
    # Before the number of entries: a later version may have more.
    if not 1 <= version <= FORMAT_VERSION:
        hint = "a newer rcp-kernels wrote the file: upgrade" if version > FORMAT_VERSION else "the file is damaged"
        raise ValueError(f"PackedWeight: version must be 1 to {FORMAT_VERSION}, got {version}; {hint}")
    entries = 4 if version == 1 else 5
    if len(fields) != entries:
        raise ValueError(
            f"PackedWeight: format of version {version} has {entries + 1} entries, got {header.numel()}; the file is "
            f"damaged"
        )
    kind = fields[4] if version > 1 else 0
    kinds = KINDS[:version]
    if not 0 <= kind < len(kinds):
        raise ValueError(
            f"PackedWeight: kind in format of version {version} must be one of "
            f"{', '.join(f'{i} ({name})' for i, name in enumerate(kinds))}, got {kind}; the file is damaged"
        )
    bits, group_size, in_features, out_features = fields[:4]
    return version, kinds[kind], Geometry(out_features, in_features, bits, group_size)
