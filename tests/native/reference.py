"""The ops in numpy, float64 and exact integers, written from docs/format.md and docs/numerics.md, not from csrc."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT_TYPES = ("float32", "float16", "bfloat16")


def to_bytes(x: np.ndarray, name: str) -> np.ndarray:
    """float32 values as the raw bytes of the type ``name``; values must be representable in it."""
    if name == "bfloat16":
        return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).ravel()
    return np.ascontiguousarray(x, name).view(np.uint8).ravel()


def from_bytes(raw: np.ndarray, name: str) -> np.ndarray:
    """The inverse of :func:`to_bytes`, as float32."""
    if name == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(name).astype(np.float32)


def representable(x: np.ndarray, name: str) -> np.ndarray:
    """x rounded to the type (down, for bfloat16), as float32."""
    with np.errstate(over="ignore"):
        return from_bytes(to_bytes(x, name), name).reshape(x.shape)


def quantize_activation(x: np.ndarray, bits: int, clip: float) -> tuple[np.ndarray, np.ndarray]:
    """q int64 and float32 scales of float32 tokens [M, K], with the contract's float32 steps."""
    qmax = np.float32(7 if bits == 4 else 127)
    scale = np.abs(x).max(axis=-1, initial=0).astype(np.float32) * np.float32(clip) / qmax
    scale = np.where(scale >= np.float32(2.0**-120), scale, np.float32(0))
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    with np.errstate(over="ignore"):
        scaled = (x * inverse[:, None]).astype(np.float32)
    return np.clip(np.rint(scaled), -qmax - 1, qmax).astype(np.int64), scale


@dataclass(frozen=True)
class Weight:
    """A quantized weight, one code per element."""

    codes: np.ndarray  # uint8 [N, K]
    levels: np.ndarray  # int8 [N, groups, 2**bits]
    scales: np.ndarray  # float16 [N, groups]
    tensor_scale: float
    bits: int
    group_size: int

    @property
    def groups(self) -> int:
        return self.levels.shape[1]

    def canonical_codes(self) -> np.ndarray:
        """The little-endian bit stream of format version 1."""
        rows, columns = self.codes.shape
        padded = np.zeros((rows, self.groups * self.group_size), np.uint8)
        padded[:, :columns] = self.codes
        bits = (padded[..., None] >> np.arange(self.bits)) & 1
        return np.packbits(bits.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")

    def chosen_levels(self) -> np.ndarray:
        """The level of every element, int64 [N, K]."""
        group = np.arange(self.codes.shape[1]) // self.group_size
        return self.levels[np.arange(len(self.codes))[:, None], group[None, :], self.codes].astype(np.int64)

    def group_sums(self, q: np.ndarray) -> np.ndarray:
        """Sums of q * level per group, [M, N, groups]; exact for integer q."""
        products = q[:, None, :] * self.chosen_levels()[None]
        edges = np.arange(0, self.codes.shape[1], self.group_size)
        return np.add.reduceat(products, edges, axis=2)

    def linear(
        self, x: np.ndarray, bias: np.ndarray | None, act_bits: int, clip: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(y, magnitude) in float64. The magnitude is the sum over absolute values: rounding errors scale with it."""
        if act_bits == 16:
            q, scale = x.astype(np.float64), np.ones(len(x))
        else:
            q, scale = quantize_activation(x, act_bits, clip)
        factor = scale.astype(np.float64)[:, None] * self.tensor_scale
        scales = self.scales.astype(np.float64)
        added = 0.0 if bias is None else bias.astype(np.float64)
        y = np.einsum("mng,ng->mn", self.group_sums(q), scales) * factor + added
        absolute = Weight(
            self.codes, np.abs(self.levels.astype(np.int64)), self.scales, 1.0, self.bits, self.group_size
        )
        magnitude = np.einsum("mng,ng->mn", absolute.group_sums(np.abs(q)), scales) * factor + np.abs(added)
        return y, magnitude
