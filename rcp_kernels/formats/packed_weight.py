"""The packed weight: low-bit codes into one small table of levels per group (docs/format.md).

``value[n, k] = tensor_scale * scales[n, g] * levels[n, g, code[n, k]]`` with ``g = k // group_size``. Every method of
this package only chooses levels and codes, so this is the one form in which a quantized weight is stored and exchanged.
Backends may repack it once, on load, into an order of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "PackedWeight",
    "merge_rows",
    "num_groups",
    "pack_codes",
    "row_bytes",
    "snap_levels",
    "uniform_step",
    "unpack_codes",
]

FORMAT_VERSION = 3
"""The newest version that this package reads. A weight is written in the lowest one that can express it."""

INPUT_ORDER_VERSION = 3
"""The version that brought ``input_order``. Every weight of this version has one, and no weight of an earlier one."""

KINDS = ("table", "uniform")
"""What a group stores of its levels: all of them, or the first of an arithmetic progression. The index is the number
in ``format``; ``KINDS[:version]`` are those that a version has."""

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128)
MAX_GROUP_SIZE = 2**17 - 1
"""128 * 128 * 131071 is the largest sum of 8-bit activations times levels in int32."""
LEVEL_MAX = 127
"""Largest level written: the table is symmetric, -128 is legal to read but never produced by :func:`snap_levels`."""

# The largest group scale is put into [2**7, 2**8): scale * level then fits float16 (127 * 256 < 65504), for consumers
# that dequantize in half, and scales down to 2**-21 of the largest one still have float16's full precision.
_LARGEST_SCALE_EXPONENT = 7

# Packing takes a temporary int64 for eight codes, unpacking an index for each: rows are done a few at a time.
_CHUNK_WEIGHTS = 1 << 22


def check_bits(bits: int) -> int:
    """Return ``bits`` if the format knows it, else raise ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}; choose 2, 3 or 4 bits a code")
    return bits


def check_group_size(group_size: int, in_features: int) -> int:
    """Return ``group_size`` if the format knows it for a row of ``in_features`` weights, else raise ValueError."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size not in (*GROUP_SIZES, in_features):
        raise ValueError(
            f"group_size must be one of {GROUP_SIZES} or in_features ({in_features}), got {group_size!r}; "
            f"pass in_features for one group a row"
        )
    if group_size > MAX_GROUP_SIZE:
        raise ValueError(
            f"group_size must be at most {MAX_GROUP_SIZE}, so that a group's integer sum fits int32, got {group_size}; "
            f"use {GROUP_SIZES[-1]}"
        )
    return group_size


def kind_version(kind: str) -> int:
    """The format version that brought a kind of :data:`KINDS`."""
    return KINDS.index(kind) + 1


def uniform_step(bits: int) -> int:
    """The difference of neighbouring levels in a uniform group: 32, 16 or 8, so that any 2**bits of them fit int8."""
    return 1 << (7 - bits)


def check_input_order(order: Tensor, in_features: int) -> Tensor:
    """Return ``order`` if it is a permutation of the inputs of a layer, else raise ValueError.

    Args:
        order: int64 [in_features]; its values are not looked at on the meta device, which has none.
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


def num_groups(in_features: int, group_size: int) -> int:
    """Groups in a row of ``in_features`` weights; the last one may be padded."""
    return -(-in_features // group_size)


def row_bytes(in_features: int, bits: int, group_size: int) -> int:
    """Bytes of codes in one row: ``in_features`` rounded up to whole groups, then to whole bytes."""
    return -(-num_groups(in_features, group_size) * group_size * bits // 8)


def _row_chunks(rows: int, weights_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_WEIGHTS // max(1, weights_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pack_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Pack codes into the little-endian bit stream of the format.

    Code ``k`` of a row occupies bits ``[k * bits, (k + 1) * bits)`` of the row's stream; bit ``i`` of the stream is bit
    ``i % 8`` of byte ``i // 8``. A row is padded with code 0 to whole groups and then with zero bits to whole bytes.

    Args:
        codes: uint8 [N, K], each below ``2**bits``.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.

    Returns:
        uint8 [N, ceil(ceil(K / group_size) * group_size * bits / 8)].

    Raises:
        TypeError: codes are not uint8.
        ValueError: wrong shape, bits or group size, or a code of ``2**bits`` or more.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(
            f"pack_codes: codes must be uint8, one code a byte, got {codes.dtype}; convert with .to(torch.uint8)"
        )
    if codes.dim() != 2 or codes.shape[1] == 0:
        raise ValueError(
            f"pack_codes: codes must be [N, K] with K >= 1, got shape {tuple(codes.shape)}; reshape to two dims"
        )
    rows, in_features = codes.shape
    check_group_size(group_size, in_features)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(
            f"pack_codes: codes of {bits} bits must be below {2**bits}, got {int(codes.max())}; use more bits or fewer "
            f"levels"
        )
    width = row_bytes(in_features, bits, group_size)
    packed = torch.empty((rows, width), dtype=torch.uint8, device=codes.device)
    # Eight codes are `bits` whole bytes for every width of the format.
    blocks = -(-width // bits)
    for chunk in _row_chunks(rows, in_features):
        part = torch.nn.functional.pad(codes[chunk], (0, blocks * 8 - in_features)).view(-1, blocks, 8)
        word = torch.zeros(part.shape[:2], dtype=torch.int64, device=codes.device)
        for k in range(8):
            word |= part[:, :, k].to(torch.int64) << (bits * k)
        stream = torch.stack([(word >> (8 * j)).to(torch.uint8) for j in range(bits)], dim=-1)
        packed[chunk] = stream.view(-1, blocks * bits)[:, :width]
    return packed


def unpack_codes(packed: Tensor, in_features: int, bits: int, group_size: int) -> Tensor:
    """Undo :func:`pack_codes`; padding is dropped.

    Args:
        packed: uint8 [N, ceil(ceil(K / group_size) * group_size * bits / 8)].
        in_features: K.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.

    Returns:
        uint8 [N, K], one code a byte.

    Raises:
        TypeError: packed is not uint8.
        ValueError: wrong shape, bits or group size.
    """
    check_bits(bits)
    check_group_size(group_size, in_features)
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_codes: packed codes must be uint8, got {packed.dtype}; pass the output of pack_codes")
    width = row_bytes(in_features, bits, group_size)
    if packed.dim() != 2 or packed.shape[1] != width:
        raise ValueError(
            f"unpack_codes: {in_features} codes of {bits} bits in groups of {group_size} take {width} bytes a row, got "
            f"shape {tuple(packed.shape)}; the codes are truncated or belong to other bits, group_size or in_features"
        )
    codes = torch.empty((packed.shape[0], in_features), dtype=torch.uint8, device=packed.device)
    for chunk in _row_chunks(packed.shape[0], in_features):
        codes[chunk] = _unpack_bits(packed[chunk], in_features, bits)
    return codes


def _unpack_bits(packed: Tensor, in_features: int, bits: int) -> Tensor:
    rows, width = packed.shape
    blocks = -(-width // bits)
    stream = torch.nn.functional.pad(packed, (0, blocks * bits - width)).view(rows, blocks, bits).to(torch.int32)
    codes = []
    for k in range(8):
        byte, shift = divmod(bits * k, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:  # a 3-bit code may straddle two bytes
            code = code | (stream[:, :, byte + 1] << (8 - shift))
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=-1).view(rows, blocks * 8)[:, :in_features]


def snap_levels(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Snap real-valued levels to the format's int8 levels, float16 group scales and power-of-two tensor scale.

    Per group ``level = rint(127 * v / max|v|)`` and ``scale = max|v| / 127``: the error of a level is at most 1/254 of
    the group's largest level, plus the rounding of the scale to float16 (2**-11 relative).

    Args:
        levels: floating point [N, groups, 2**bits], ascending along the last dimension, in units of the weight.

    Returns:
        int8 levels [N, groups, 2**bits], float16 scales [N, groups], float32 tensor scale (0-dim, a power of two).

    Raises:
        TypeError: levels are not floating point.
        ValueError: NaN, Inf or values beyond float32 in levels, levels that descend, or levels on the meta device.
    """
    if not levels.is_floating_point():
        raise TypeError(
            f"levels must be floating point [N, groups, 2**bits], got {levels.dtype}; convert with .float()"
        )
    if levels.is_meta:
        raise ValueError("levels must have values, got a tensor on the meta device; load the levels first")
    values = levels.to(torch.float32)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"levels must be finite in float32, got {float(values[tuple(index)])} at row, group, level {index}; check "
            f"the weight or the method that chose them"
        )
    check_ascending(values)
    largest = values.abs().amax(dim=-1)
    scales = largest / LEVEL_MAX
    peak = float(scales.max()) if scales.numel() else 0.0
    exponent = 0
    if peak > 0.0:
        # Held inside float32's normal numbers, so that a product with the tensor scale is exact.
        exponent = min(max(math.frexp(peak)[1] - 1 - _LARGEST_SCALE_EXPONENT, -126), 127)
    tensor_scale = torch.tensor(2.0**exponent, dtype=torch.float32, device=levels.device)
    # In float64: 127 / max|v| overflows float32 where max|v| is subnormal.
    ratio = torch.where(largest > 0, LEVEL_MAX / largest.to(torch.float64), 0.0)
    snapped = torch.round(values.to(torch.float64) * ratio[..., None]).to(torch.int8)
    return snapped, (scales.to(torch.float64) / tensor_scale).to(torch.float16), tensor_scale


def check_ascending(levels: Tensor) -> None:
    """Raise ValueError unless ``levels`` are non-decreasing along their last dimension."""
    descending = (levels[..., 1:] < levels[..., :-1]).any(dim=-1)
    if bool(descending.any()):
        first = descending.nonzero()[0].tolist()
        raise ValueError(
            f"levels must be ascending (equal neighbours are allowed) in every group, got "
            f"{levels[tuple(first)].tolist()} in row, group {first}; sort the levels and renumber the codes to match"
        )


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight of a linear layer, [N, K] = [out_features, in_features] (docs/format.md).

    Constructing one does not check it; :meth:`pack`, :meth:`from_float_levels` and :meth:`from_state_dict` do.

    Attributes:
        codes: uint8 [N, ceil(ceil(K/G)*G*bits/8)], the bit stream of :func:`pack_codes`.
        levels: int8 [N, ceil(K/G), 2**bits], ascending along the last dimension; of kind "uniform" the first level
            only, [N, ceil(K/G), 1]. ``as_table().levels`` is the tables of either kind.
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
        """Build a checked weight from codes that are still one a byte.

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
        """Import codes with real-valued levels (float16 tables, say) by :func:`snap_levels`.

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
    def version(self) -> int:
        """The format version that stores it without an input order: 1 for tables, 2 for uniform groups."""
        return kind_version(self.kind)

    def as_table(self) -> PackedWeight:
        """The same weight with its levels as tables: self, or one of kind "table" that dequantizes to the same bits."""
        if self.kind == "table":
            return self
        ramp = torch.arange(2**self.bits, dtype=torch.int8, device=self.levels.device) * uniform_step(self.bits)
        return replace(self, levels=self.levels + ramp, kind="table")

    def as_uniform(self) -> PackedWeight:
        """The same weight with the first level of each group only: self, or one of kind "uniform" with the same bits.

        A group of scale 0 is zero whatever its levels are: without a progression, it gets the one that starts at 0.

        Raises:
            ValueError: a group's levels are no progression with the step 2**(7 - bits), or levels on the meta device.
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
        steps = self.levels.to(torch.int16).diff(dim=-1)
        other = (steps != step).any(dim=-1)
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
        """Check every rule of the format and return self.

        Values are not looked at on the meta device, which has none.

        Raises:
            ValueError: naming the rule, the value found and the remedy.
        """
        if self.kind not in KINDS:
            raise ValueError(
                f"PackedWeight: kind must be one of {KINDS}, got {self.kind!r}; use 'table', which holds any levels"
            )
        for name in ("in_features", "out_features"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"PackedWeight: {name} must be an int, got {value!r}; convert with int()")
        check_bits(self.bits)
        if self.in_features < 1 or self.out_features < 1:
            raise ValueError(
                f"PackedWeight: in_features and out_features must be at least 1, got {self.in_features} and "
                f"{self.out_features}; an empty layer has nothing to pack"
            )
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
                    f"PackedWeight: {name} must have shape {shape} for out_features={self.out_features}, "
                    f"in_features={self.in_features}, bits={self.bits}, group_size={self.group_size}, "
                    f"kind={self.kind!r}, got {tuple(tensor.shape)}; the tensor is truncated or the metadata belongs "
                    f"to another weight"
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
                f"PackedWeight: the first level of a uniform group at {self.bits} bits must be at most {last}, so that "
                f"the last is at most 127, got {int(self.levels[tuple(index)])} in row, group {index}; move the scale "
                f"or store the group's table"
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
                f"{index}; a negative scale belongs into the levels, an infinite one into tensor_scale"
            )
        scale = float(self.tensor_scale)
        if not (math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5):
            raise ValueError(
                f"PackedWeight: tensor_scale must be a finite positive power of two, got {scale}; round it to a power "
                f"of two and put the rest into scales"
            )

    def unpack(self) -> Tensor:
        """Codes as uint8 [N, K], one a byte, without padding."""
        return unpack_codes(self.codes, self.in_features, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """The weight as float32 [N, K].

        Exact: a float16 scale times an int8 level has at most 18 significant bits and tensor_scale is a power of two,
        so nothing is rounded unless the value is below float32's normal range.
        """
        table = self.as_table().levels.to(torch.float32) * self.scales.to(torch.float32)[..., None] * self.tensor_scale
        weight = torch.empty((self.out_features, self.in_features), dtype=torch.float32, device=self.codes.device)
        first_entry = torch.arange(table.shape[1], dtype=torch.int32, device=self.codes.device) * 2**self.bits
        first_entry = first_entry.repeat_interleave(self.group_size)[: self.in_features]
        for chunk in _row_chunks(self.out_features, self.in_features):
            index = _unpack_bits(self.codes[chunk], self.in_features, self.bits).to(torch.int32) + first_entry
            weight[chunk] = torch.gather(table[chunk].flatten(1), 1, index.to(torch.int64))
        return weight

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on ``device``, not copied where they are there."""
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
        """The on-disk form: the four tensors and ``format``, int64 [version, bits, group_size, in_features,
        out_features], with the number of the kind as a sixth entry from version 2 on.

        ``format`` is on the CPU wherever the tensors are, so that reading it never waits for a device.

        Args:
            prefix: of the keys.
            input_order: int64 [K], where column k of the weight belongs to input ``input_order[k]`` of the layer. It
                is stored as a sixth tensor, and the version is then :data:`INPUT_ORDER_VERSION`.
        """
        tensors: dict[str, Tensor] = {prefix + name: getattr(self, name) for name in self.TENSORS}
        version = self.version if input_order is None else INPUT_ORDER_VERSION
        shape = (self.bits, self.group_size, self.in_features, self.out_features)
        tensors[prefix + "format"] = make_header(version, self.kind, *shape)
        if input_order is not None:
            tensors[prefix + "input_order"] = input_order
        return tensors

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> PackedWeight:
        """Read what :meth:`state_dict` wrote without an input order; other keys are ignored.

        Raises:
            ValueError: as :meth:`read`, or the weight has an input order, which a PackedWeight does not hold.
        """
        weight, order = cls.read(state_dict, prefix)
        if order is not None:
            raise ValueError(
                f"PackedWeight: a stored weight must have no input_order, which a PackedWeight does not hold, got one "
                f"of {len(order)} entries; read it with QuantLinear.from_state_dict, or with PackedWeight.read, which "
                f"returns the order too"
            )
        return weight

    @classmethod
    def read(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> tuple[PackedWeight, Tensor | None]:
        """Read what :meth:`state_dict` wrote; other keys are ignored.

        Returns:
            The weight, and its input order or None: column k of the weight belongs to input ``input_order[k]``.

        Raises:
            ValueError: a key is missing, format is no int64 tensor with values or is from the future, there is an
                input order in a version that has none, or :meth:`validate` or :func:`check_input_order` finds a broken
                rule.
        """
        missing = [prefix + name for name in cls.KEYS if prefix + name not in state_dict]
        if missing:
            raise ValueError(
                f"PackedWeight: a stored weight is the five tensors {', '.join(cls.KEYS)}, missing "
                f"{', '.join(missing)}; the checkpoint is incomplete or was not written in this format"
            )
        version, kind, (bits, group_size, in_features, out_features) = _read_header(state_dict[prefix + "format"])
        codes, levels, scales, tensor_scale = (state_dict[prefix + name] for name in cls.TENSORS)
        weight = cls(codes, levels, scales, tensor_scale, bits, group_size, in_features, out_features, kind).validate()
        order = state_dict.get(prefix + "input_order")
        if (order is None) != (version < INPUT_ORDER_VERSION):
            raise ValueError(
                f"PackedWeight: a weight of version {version} must have {'an' if order is None else 'no'} input_order "
                f"beside it, got {'none' if order is None else 'one'}; the checkpoint is incomplete or the tensors are "
                f"of two layers"
            )
        try:
            return weight, None if order is None else check_input_order(order, in_features)
        except ValueError as error:
            raise ValueError(f"PackedWeight: {error}") from None


def merge_rows(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Weights with the same inputs as one weight, the rows of each below those of the one before, if that is exact.

    The merged weight has the largest tensor_scale. The scales of the others are multiplied by a power of two of at most
    1, which is exact unless float16 runs out of small numbers, below 2**-14.

    Args:
        weights: one or more of the same bits, group_size, in_features and kind.

    Returns:
        A weight that gives the same bits as the others one by one, or None where no common tensor_scale does.

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
        # As integers: torch.autocast, if it is on, would have an opinion on floats.
        scales=torch.cat([part.view(torch.int16) for part in scales]).view(torch.float16),
        tensor_scale=torch.tensor(largest, dtype=torch.float32, device=scales[0].device),
        out_features=sum(weight.out_features for weight in weights),
    )


def make_header(version: int, kind: str, *shape: int) -> Tensor:
    """``format`` of a stored weight; ``shape`` is bits, group_size, in_features, out_features."""
    kinds = [KINDS.index(kind)] if version > 1 else []
    return torch.tensor([version, *shape, *kinds], dtype=torch.int64, device="cpu")


def _read_header(header: object) -> tuple[int, str, tuple[int, int, int, int]]:
    """Version, kind, and bits, group_size, in_features and out_features of ``format``."""
    rule = "PackedWeight: format must be int64 [version, bits, group_size, in_features, out_features]"
    if not isinstance(header, Tensor):
        raise ValueError(f"{rule}, got {type(header).__name__}; store it as the tensor that state_dict gave")
    if header.dtype != torch.int64 or header.dim() != 1 or header.numel() < 1:
        raise ValueError(f"{rule}, got {header.dtype} of shape {tuple(header.shape)}; store it unconverted")
    if header.is_meta:
        raise ValueError(f"{rule}, got a tensor on the meta device, which has no values; load it on the CPU")
    version, *fields = (int(value) for value in header.tolist())
    if not 1 <= version <= FORMAT_VERSION:  # before its length: a later version may say more
        hint = (
            "the file was written by a newer rcp-kernels: upgrade it"
            if version > FORMAT_VERSION
            else "the file is damaged"
        )
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
    return version, kinds[kind], (bits, group_size, in_features, out_features)


# torch.load(weights_only=True), the default, builds only classes that it was told of.
torch.serialization.add_safe_globals([PackedWeight])
