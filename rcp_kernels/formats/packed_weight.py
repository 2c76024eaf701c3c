"""The packed weight: low-bit codes into one small table of levels for each group (docs/format.md).

``value[n, k] = tensor_scale * scales[n, g] * levels[n, g, code[n, k]]`` with ``g = k // group_size``. All methods of
this package store and exchange quantized weights in this form. They differ in how they choose levels and codes. A
backend may repack a weight once, on load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codes import (
    Geometry,
    check_bits,
    check_group_size,
    num_groups,
    pack_codes,
    row_bytes,
    row_chunks,
    unpack_bits,
    unpack_codes,
)
from .header import INPUT_ORDER_VERSION, KINDS, kind_version, make_header, read_header
from .levels import check_ascending, snap_levels, uniform_step

__all__ = ["PackedWeight", "check_input_order", "merge_rows"]


def check_input_order(order: Tensor, in_features: int) -> Tensor:
    """Return ``order`` if it is a permutation of the inputs of a layer, else raise ValueError.

    Args:
        order: int64 [in_features]. A tensor on the meta device has no values to check.
        in_features: K.
    """
    rule = f"input_order must be int64 [{in_features}] (in_features) with each of 0 to {in_features - 1} once"
    if not isinstance(order, Tensor):
        raise ValueError(f"{rule}, got {type(order).__name__}; convert with torch.as_tensor")
    if order.dtype != torch.int64 or tuple(order.shape) != (in_features,):
        raise ValueError(f"{rule}, got {order.dtype} of shape {tuple(order.shape)}; store it unconverted")
    if not order.is_meta:
        wrong = order.sort().values != torch.arange(in_features, device=order.device)
        if bool(wrong.any()):
            raise ValueError(
                f"{rule}, got values where {int(wrong.nonzero()[0])} is missing or another one comes twice; pass the "
                f"permutation of the columns"
            )
    return order


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight of a linear layer, [N, K] = [out_features, in_features] (docs/format.md).

    The constructor checks nothing; :meth:`pack`, :meth:`from_float_levels` and :meth:`from_state_dict` do.

    Attributes:
        codes: uint8 [N, ceil(ceil(K/G)*G*bits/8)], the bit stream of :func:`pack_codes`.
        levels: int8 [N, ceil(K/G), 2**bits], ascending along the last dimension. Kind "uniform" stores the first level
            only, [N, ceil(K/G), 1]; ``as_table().levels`` gives the tables of either kind.
        scales: float16 [N, ceil(K/G)], finite and >= 0.
        tensor_scale: float32, 0-dim, a positive power of two.
        bits: bits a code: 2, 3 or 4.
        group_size: G, weights that share a table along K: 32, 64, 128 or K.
        in_features: K.
        out_features: N.
        kind: "table", or "uniform": level i of a group is ``levels[n, g, 0] + i * 2**(7 - bits)``.
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor
    tensor_scale: Tensor
    bits: int
    group_size: int
    in_features: int
    out_features: int
    kind: str = "table"

    TENSORS = ("codes", "levels", "scales", "tensor_scale")
    KEYS = (*TENSORS, "format")

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        levels: Tensor,
        scales: Tensor,
        tensor_scale: Tensor | float = 1.0,
        *,
        bits: int,
        group_size: int,
    ) -> PackedWeight:
        """Build a checked weight from codes of one byte each.

        Args:
            codes: uint8 [N, K], each below ``2**bits``.
            levels: int8 [N, ceil(K/G), 2**bits], ascending.
            scales: float16 [N, ceil(K/G)].
            tensor_scale: a positive power of two.
            bits: 2, 3 or 4.
            group_size: G: 32, 64, 128 or K.

        Raises:
            TypeError, ValueError: as :func:`pack_codes` and :meth:`validate`.
        """
        stream = pack_codes(codes, bits, group_size)
        if not isinstance(tensor_scale, Tensor):
            tensor_scale = torch.tensor(tensor_scale, dtype=torch.float32, device=codes.device)
        out_features, in_features = codes.shape
        return cls(
            stream, levels.contiguous(), scales.contiguous(), tensor_scale, bits, group_size, in_features, out_features
        ).validate()

    @classmethod
    def from_float_levels(cls, codes: Tensor, levels: Tensor, *, bits: int, group_size: int) -> PackedWeight:
        """Build a checked weight from codes and real-valued levels, which :func:`snap_levels` snaps to int8.

        Args:
            codes: uint8 [N, K], each below ``2**bits``.
            levels: floating point [N, ceil(K/G), 2**bits], ascending, in units of the weight.
            bits: 2, 3 or 4.
            group_size: G: 32, 64, 128 or K.

        Raises:
            TypeError, ValueError: as :func:`snap_levels` and :meth:`pack`.
        """
        snapped, scales, tensor_scale = snap_levels(levels)
        return cls.pack(codes, snapped, scales, tensor_scale, bits=bits, group_size=group_size)

    @property
    def geometry(self) -> Geometry:
        """(out_features, in_features, bits, group_size), which the operators on a repacked weight take."""
        return Geometry(self.out_features, self.in_features, self.bits, self.group_size)

    @property
    def version(self) -> int:
        """The format version that stores it without an input order: 1 for tables, 2 for uniform groups."""
        return kind_version(self.kind)

    def as_table(self) -> PackedWeight:
        """The same weight of kind "table"; it dequantizes to the same bits. Returns self if it is of that kind."""
        if self.kind == "table":
            return self
        ramp = torch.arange(2**self.bits, dtype=torch.int8, device=self.levels.device) * uniform_step(self.bits)
        return replace(self, levels=self.levels + ramp, kind="table")

    def as_uniform(self) -> PackedWeight:
        """The same weight of kind "uniform"; it dequantizes to the same bits. Returns self if it is of that kind.

        A group of scale 0 is zero with any levels. If its levels are no progression, its first level becomes 0.

        Raises:
            ValueError: a group's levels are no progression with the step 2**(7 - bits), or are on the meta device.
        """
        if self.kind == "uniform":
            return self
        if self.levels.is_meta:
            raise ValueError(
                "PackedWeight: levels must have values to be found uniform, got a tensor on the meta device; load the "
                "weight first"
            )
        step = uniform_step(self.bits)
        # In int16: the difference of two int8 levels may be 255.
        other = (self.levels.to(torch.int16).diff(dim=-1) != step).any(dim=-1)
        refused = other & (self.scales != 0)
        if bool(refused.any()):
            first = refused.nonzero()[0].tolist()
            raise ValueError(
                f"PackedWeight: levels of a uniform group at {self.bits} bits must rise by {step} from each to the "
                f"next, got {self.levels[tuple(first)].tolist()} in row, group {first}; keep the weight of kind 'table'"
            )
        levels = self.levels[..., :1].masked_fill(other[..., None], 0)
        return replace(self, levels=levels, kind="uniform")

    def validate(self) -> PackedWeight:
        """Check every rule of the format and return self. Tensors on the meta device have no values to check.

        Raises:
            ValueError: the error names the rule, the value found and the remedy.
        """
        if self.kind not in KINDS:
            raise ValueError(
                f"PackedWeight: kind must be one of {KINDS}, got {self.kind!r}; use 'table', which holds any levels"
            )
        for name in ("in_features", "out_features"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"PackedWeight: {name} must be an int of at least 1, got {value!r}; convert with int()"
                )
        check_bits(self.bits)
        check_group_size(self.group_size, self.in_features)
        groups = num_groups(self.in_features, self.group_size)
        width = row_bytes(self.in_features, self.bits, self.group_size)
        rules: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (self.out_features, width)),
            "levels": (torch.int8, (self.out_features, groups, 1 if self.kind == "uniform" else 2**self.bits)),
            "scales": (torch.float16, (self.out_features, groups)),
            "tensor_scale": (torch.float32, ()),
        }
        for name, (dtype, shape) in rules.items():
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"PackedWeight: {name} must be {dtype}, got {found}; store it unconverted")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"PackedWeight: {name} must have shape {shape} for {self.geometry} and kind={self.kind!r}, got "
                    f"{tuple(tensor.shape)}; the tensor is truncated or the metadata belongs to another weight"
                )
            if tensor.device != self.codes.device:
                raise ValueError(
                    f"PackedWeight: all tensors must be on the device of codes ({self.codes.device}), got {name} on "
                    f"{tensor.device}; move them together"
                )
        if not self.codes.is_meta:
            self._validate_values()
        return self

    def _validate_values(self) -> None:
        last = uniform_step(self.bits) - 1
        if self.kind == "uniform" and bool((self.levels > last).any()):
            index = (self.levels[..., 0] > last).nonzero()[0].tolist()
            raise ValueError(
                f"PackedWeight: the first level of a uniform group at {self.bits} bits must be at most {last}, as the "
                f"last must be at most 127, got {int(self.levels[tuple(index)])} in row, group {index}; change the "
                f"scale or store the group's table"
            )
        try:
            check_ascending(self.levels)
        except ValueError as error:
            raise ValueError(f"PackedWeight: {error}") from None
        bad = ~torch.isfinite(self.scales) | (self.scales < 0)
        if bool(bad.any()):
            index = bad.nonzero()[0].tolist()
            raise ValueError(
                f"PackedWeight: scales must be finite and >= 0, got {float(self.scales[tuple(index)])} in row, group "
                f"{index}; move a negative sign into levels, and an overflow into tensor_scale"
            )
        scale = float(self.tensor_scale)
        if not (math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5):
            raise ValueError(
                f"PackedWeight: tensor_scale must be a finite positive power of two, got {scale}; round it to a power "
                f"of two and put the rest into scales"
            )

    def unpack(self) -> Tensor:
        """The codes as uint8 [N, K], one a byte, without padding."""
        return unpack_codes(self.codes, self.in_features, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """The weight as float32 [N, K].

        Exact: a float16 scale times an int8 level has at most 18 significant bits, and tensor_scale is a power of two.
        Only values below float32's normal range are rounded.
        """
        table = self.as_table().levels.to(torch.float32) * self.scales.to(torch.float32)[..., None] * self.tensor_scale
        weight = torch.empty((self.out_features, self.in_features), dtype=torch.float32, device=self.codes.device)
        first_entry = torch.arange(table.shape[1], dtype=torch.int32, device=self.codes.device) * 2**self.bits
        first_entry = first_entry.repeat_interleave(self.group_size)[: self.in_features]
        for chunk in row_chunks(self.out_features, self.in_features):
            index = unpack_bits(self.codes[chunk], self.in_features, self.bits).to(torch.int32) + first_entry
            weight[chunk] = torch.gather(table[chunk].flatten(1), 1, index.to(torch.int64))
        return weight

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on ``device``. Tensors that are already there are not copied."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.TENSORS})

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors as stored."""
        return sum(getattr(self, name).nbytes for name in self.TENSORS)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each of the N * K weights, padding, tables and scales included."""
        return 8 * self.nbytes / (self.in_features * self.out_features)

    def state_dict(self, prefix: str = "", input_order: Tensor | None = None) -> dict[str, Tensor]:
        """The on-disk form: the four tensors and ``format``.

        ``format`` is int64 [version, bits, group_size, in_features, out_features]. From version 2 on, the index of the
        kind follows. It is always on the CPU, where reading it does not wait for a device.

        Args:
            prefix: of the keys.
            input_order: int64 [K]: column k of the weight belongs to input ``input_order[k]`` of the layer. It is
                stored too, and the version is then :data:`INPUT_ORDER_VERSION`.
        """
        tensors: dict[str, Tensor] = {prefix + name: getattr(self, name) for name in self.TENSORS}
        version = self.version if input_order is None else INPUT_ORDER_VERSION
        tensors[prefix + "format"] = make_header(version, self.kind, self.geometry)
        if input_order is not None:
            tensors[prefix + "input_order"] = input_order
        return tensors

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> PackedWeight:
        """Read the tensors of :meth:`state_dict`, without an input order; other keys are ignored.

        Raises:
            ValueError: as :meth:`read`, or the weight has an input order, which a PackedWeight does not hold.
        """
        weight, order = cls.read(state_dict, prefix)
        if order is not None:
            raise ValueError(
                f"PackedWeight: a stored weight must have no input_order, got one of {len(order)} entries; read it "
                f"with QuantLinear.from_state_dict, or with PackedWeight.read, which returns the order too"
            )
        return weight

    @classmethod
    def read(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> tuple[PackedWeight, Tensor | None]:
        """Read the tensors of :meth:`state_dict`; other keys are ignored.

        Returns:
            The weight, and its input order or None: column k of the weight belongs to input ``input_order[k]``.

        Raises:
            ValueError: a key is missing, ``format`` is damaged or of a later version, an input order is missing or
                unexpected, or :meth:`validate` or :func:`check_input_order` finds a broken rule.
        """
        missing = [prefix + name for name in cls.KEYS if prefix + name not in state_dict]
        if missing:
            raise ValueError(
                f"PackedWeight: a stored weight is the five tensors {', '.join(cls.KEYS)}, missing "
                f"{', '.join(missing)}; the checkpoint is incomplete or was not written in this format"
            )
        version, kind, geometry = read_header(state_dict[prefix + "format"])
        codes, levels, scales, tensor_scale = (state_dict[prefix + name] for name in cls.TENSORS)
        rows, columns, bits, group_size = geometry
        weight = cls(codes, levels, scales, tensor_scale, bits, group_size, columns, rows, kind).validate()
        order = state_dict.get(prefix + "input_order")
        if (order is None) != (version < INPUT_ORDER_VERSION):
            raise ValueError(
                f"PackedWeight: a weight of version {version} must have {'an' if order is None else 'no'} input_order "
                f"beside it, got {'none' if order is None else 'one'}; the checkpoint is incomplete or the tensors are "
                f"of two layers"
            )
        try:
            return weight, None if order is None else check_input_order(order, columns)
        except ValueError as error:
            raise ValueError(f"PackedWeight: {error}") from None


def merge_rows(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Stack the rows of several weights with the same inputs in one weight, if that is exact.

    The merged weight has the largest tensor_scale. The scales of the others are multiplied by a power of two of at most
    1. That is exact unless a scale falls below 2**-14, float16's smallest normal number.

    Args:
        weights: one or more of the same bits, group_size, in_features and kind.

    Returns:
        A weight that gives the same bits as the separate weights. None if there is no common tensor_scale.

    Raises:
        ValueError: bits, group_size, in_features or kind differ.
    """
    first = weights[0]
    for name in ("bits", "group_size", "in_features", "kind"):
        found = [getattr(weight, name) for weight in weights]
        if any(value != found[0] for value in found):
            raise ValueError(f"merge_rows: {name} must be the same in all weights, got {found}; keep them apart")
    largest = max(float(weight.tensor_scale) for weight in weights)
    scales = []
    for weight in weights:
        exact = weight.scales.to(torch.float64) * (float(weight.tensor_scale) / largest)
        scales.append(exact.to(torch.float16))
        if not torch.equal(scales[-1].to(torch.float64), exact):
            return None
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in weights]),
        levels=torch.cat([weight.levels for weight in weights]),
        # As integers: torch.autocast would cast floats.
        scales=torch.cat([part.view(torch.int16) for part in scales]).view(torch.float16),
        tensor_scale=torch.tensor(largest, dtype=torch.float32, device=scales[0].device),
        out_features=sum(weight.out_features for weight in weights),
    )


# torch.load(weights_only=True), the default, builds only the classes in its list.
torch.serialization.add_safe_globals([PackedWeight])
