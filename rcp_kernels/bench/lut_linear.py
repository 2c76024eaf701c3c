"""lut_linear on a CPU against torch, ggml and a plain read of memory; on a GPU against cuBLAS and low-bit kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import extras, hardware, ops
from ..formats import PackedWeight, num_groups, row_bytes
from . import peers, timing
from .driver import Benchmark, Maker, Peer, Row, dtype_name, mean, without_threads
from .ggml import Ggml
from .timing import CUDA

OURS = "lut_linear"
UNIFORM = "lut_linear, uniform groups"
READ = "plain read"
TORCH_FP32, TORCH_BF16, TORCH_INT4 = "torch fp32", "torch bf16", "torch int4"
COPY = "device copy"
CUBLAS, GEMLITE, HUMMING = "cuBLAS fp16", "gemlite", "humming"

LARGE_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))


def group_size_for(in_features: int, group_size: int) -> int:
    """group_size, halved until it divides in_features (576 = 9 * 64), but not below 32."""
    while in_features % group_size and group_size > 32:
        group_size //= 2
    return group_size


def random_packed_weight(
    out_features: int, in_features: int, bits: int, group_size: int, kind: str = "table"
) -> PackedWeight:
    """A weight made in packed form: random codes, ascending random levels, scales of about in_features**-0.5."""
    groups = num_groups(in_features, group_size)
    if kind == "uniform":
        levels = torch.randint(-72, -56, (out_features, groups, 1)).to(torch.int8)  # about symmetric grids
    else:
        width = 254 / 2**bits
        starts = torch.arange(2**bits) * width - 127
        levels = (starts + torch.randint(0, int(width), (out_features, groups, 2**bits))).floor().to(torch.int8)
    scale = in_features**-0.5 / 64
    return PackedWeight(
        codes=torch.randint(0, 256, (out_features, row_bytes(in_features, bits, group_size)), dtype=torch.uint8),
        levels=levels,
        scales=torch.empty(out_features, groups).uniform_(scale, 2 * scale).half(),
        tensor_scale=torch.tensor(1.0),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        kind=kind,
    )


@dataclass(frozen=True, kw_only=True)
class LutLinear(Benchmark):
    """On a CPU.

    Attributes:
        sizes: (out_features, in_features) of the weights.
        ggml: ggml's CPU library, which is a competitor if it is there.
    """

    bits: int = 2
    act_bits: int = 4
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    sizes: tuple[tuple[int, int], ...] = (*LARGE_SHAPES, (1536, 576), (49152, 576))
    batches: tuple[int, ...] = (1, 8, 32, 128)
    ggml: Path | None = None

    op = OURS
    variants = (OURS,)
    shape = ("out_features", "in_features")
    load = "batch"
    titles: ClassVar = {"threads": "threads", "batch": "batch", "out_features": "     N", "in_features": "     K"}
    groups: ClassVar[tuple[str, ...]] = ("threads", "batch")
    axis = "batch"
    bytes_column = "weight_bytes"
    roof = READ
    peers = (TORCH_FP32, TORCH_BF16, TORCH_INT4)
    rate = "6.2f"

    @property
    def stem(self) -> str:
        where = hardware.cpu_isa() if self.device.type == "cpu" else self.device.type
        return f"lut_linear_w{self.bits}a{self.act_bits}_{where}"

    @property
    def subject(self) -> str:
        return f"lut_linear W{self.bits}A{self.act_bits}, groups of {self.group_size}, x {self.dtype}"

    def comments(self) -> list[str]:
        library = self.ggml or f"not installed: {extras.EXTRAS['llama_cpp'].install}"
        return [f"each competitor rotates through {timing.rotated_bytes() >> 20} MB of weights", f"ggml {library}"]

    def constants(self) -> dict[str, Any]:
        return {"bits": self.bits, "act_bits": self.act_bits, "dtype": dtype_name(self.dtype)}

    def details(self, *shape: int) -> dict[str, Any]:
        return {"group_size": group_size_for(shape[1], self.group_size)}

    def shapes(self) -> Sequence[tuple[int, ...]]:
        return self.sizes

    def loads(self) -> Sequence[int]:
        return self.batches

    def competitors(self) -> dict[str, Maker]:
        makers: dict[str, Maker] = {
            OURS: self.ours,
            UNIFORM: lambda n, k: self.ours(n, k, "uniform"),
            READ: lambda n, k: peers.memory_read(),
            TORCH_FP32: lambda n, k: peers.torch_linear(n, k, torch.float32),
            TORCH_BF16: lambda n, k: peers.torch_linear(n, k, torch.bfloat16),
            TORCH_INT4: lambda n, k: peers.torch_int4(n, k, group_size_for(k, self.group_size)),
        }
        if self.ggml is not None:
            library = Ggml(self.ggml)
            makers |= {f"ggml {name}": partial(library.linear, name) for name in library.types}
        return makers

    def ours(self, out_features: int, in_features: int, kind: str = "table") -> Peer:
        """lut_linear as QuantLinear calls it, activation quantization included."""
        group_size = group_size_for(in_features, self.group_size)
        weight = random_packed_weight(out_features, in_features, self.bits, group_size, kind).to(self.device)
        geometry = (out_features, in_features, self.bits, group_size, self.act_bits)
        op = torch.ops.rcp_kernels.lut_linear.default
        # Each copy is packed, not cloned: on a CPU pack_weight asks for huge pages, as it does for a QuantLinear.
        blobs = [ops.pack_weight(weight) for _ in range(timing.copies_needed(weight.nbytes, self.device))]
        calls = [lambda x, blob=blob: op(x, blob, None, *geometry) for blob in blobs]
        x = torch.empty(0, dtype=self.dtype, device=self.device)
        return peers.linear(calls, in_features, x, weight.nbytes)

    def summary_title(self) -> str:
        return "geometric means over the large shapes (torch float: the faster of fp32 and bf16)"

    def summary(self, rows: Sequence[Row]) -> str:
        large = [row for row in rows if (row.case["out_features"], row.case["in_features"]) in LARGE_SHAPES]
        return super().summary(large) if large else ""

    def summary_text(self, rows: Sequence[Row]) -> str:
        first, *others = super().summary_text(rows).split(", ", 1)
        fastest = mean(min(speedups) for row in rows if (speedups := self._torch_float(row)))
        return ", ".join([first, *([f"{fastest:.2f} x torch float"] if fastest else []), *others])

    @staticmethod
    def _torch_float(row: Row) -> list[float]:
        found = (row.speedup(name) for name in (TORCH_FP32, TORCH_BF16))
        return [speedup for speedup in found if speedup is not None]


@dataclass(frozen=True, kw_only=True)
class CudaLutLinear(LutLinear):
    """On another device: on a GPU as CUDA graphs over weights of four times L2."""

    threads: tuple[int | None, ...] = (None,)
    dtype: torch.dtype = torch.float16
    sizes: tuple[tuple[int, int], ...] = LARGE_SHAPES
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128)
    device: torch.device = CUDA

    titles: ClassVar = without_threads(LutLinear.titles)
    groups = ("batch",)
    roof = COPY
    peers = (CUBLAS, GEMLITE, HUMMING)
    us = "8.2f"
    rate = "7.1f"

    def comments(self) -> list[str]:
        return [timing.GRAPHS] if self.device.type == "cuda" else []

    def competitors(self) -> dict[str, Maker]:
        return {
            OURS: self.ours,
            COPY: self.copy,
            CUBLAS: lambda n, k: peers.torch_linear(n, k, torch.float16, self.device),
            GEMLITE: lambda n, k: peers.gemlite(n, k, self.bits, group_size_for(k, self.group_size), self.device),
            HUMMING: lambda n, k: peers.humming(
                n, k, self.bits, self.act_bits, group_size_for(k, self.group_size), self.device
            ),
        }

    def copy(self, out_features: int, in_features: int) -> Peer:
        """A copy of as many bytes as the packed weight has."""
        weight = random_packed_weight(
            out_features, in_features, self.bits, group_size_for(in_features, self.group_size)
        )
        return peers.device_copy(weight.nbytes, self.device)
