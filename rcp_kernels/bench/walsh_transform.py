"""walsh_transform on a CPU against memcpy, a dense product, a butterfly in torch and packages from PyPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import extras, hardware, ops
from . import peers, timing
from .driver import Benchmark, Maker, Peer, Row, dtype_name, mean, without_threads
from .timing import CUDA, Call

MEMCPY = "memcpy"
DENSE = "dense matmul"
BUTTERFLY = "torch butterfly"
HADAMARD_TRANSFORM = "hadamard-transform"
PYFWHT = "pyfwht"


@dataclass(frozen=True, kw_only=True)
class WalshTransform(Benchmark):
    """x [rows, size] along its last dimension, in both orders, out of place and in place."""

    dtype: torch.dtype = torch.float32
    # Powers of two, and the m * 2^k among the widths of SmolLM2, LLaMA 2 and LLaMA 3.
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 576, 1536, 11008, 14336)
    rows: tuple[int, ...] = (1, 16, 128, 512)

    op = "walsh_transform"
    variants: ClassVar[tuple[str, ...]] = ("natural out", "natural in", "sequency out", "sequency in")
    shape = ("size",)
    load = "rows"
    titles: ClassVar = {"threads": "threads", "rows": "rows", "size": "     n", "order": "   order", "place": "place"}
    groups: ClassVar[tuple[str, ...]] = ("threads", "rows")
    axis = "size"
    peers: ClassVar[tuple[str, ...]] = (MEMCPY, DENSE, BUTTERFLY, HADAMARD_TRANSFORM, PYFWHT)
    # A dense product of size 16384 takes seconds.
    budget = 1.0

    @property
    def stem(self) -> str:
        where = hardware.cpu_isa() if self.device.type == "cpu" else self.device.type
        return f"walsh_transform_{dtype_name(self.dtype)}_{where}"

    @property
    def subject(self) -> str:
        return f"walsh_transform of {dtype_name(self.dtype)} [rows, n] along n, through the Python function"

    def comments(self) -> list[str]:
        found = []
        for module in ("hadamard_transform", "pyfwht"):
            extra = extras.EXTRAS[module]
            version = extra.version if extra.found else f"not installed: {extra.install}"
            found.append(f"{extra.distribution} {version}")
        return [
            "x is the same in every call: a small one stays in cache",
            "memcpy: copy_ into a tensor that exists; out of place, walsh_transform allocates its result",
            f"peers in natural order, beside sequency order too: {'; '.join(found)} (float64)",
        ]

    def constants(self) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype)}

    def variant_details(self, name: str) -> dict[str, Any]:
        return dict(zip(("order", "place"), name.split(), strict=True))

    def shapes(self) -> Sequence[tuple[int, ...]]:
        return [(size,) for size in self.sizes]

    def loads(self) -> Sequence[int]:
        return self.rows

    def competitors(self) -> dict[str, Maker]:
        return {name: partial(self.ours, name) for name in self.variants} | {
            MEMCPY: lambda size: peers.memcpy(),
            DENSE: lambda size: peers.dense_matmul(DENSE, size, self.dtype, self.device),
            BUTTERFLY: lambda size: peers.torch_butterfly(BUTTERFLY, size, self.dtype, self.device),
            HADAMARD_TRANSFORM: partial(peers.hadamard_transform, HADAMARD_TRANSFORM),
            PYFWHT: partial(peers.pyfwht, PYFWHT),
        }

    def ours(self, name: str, size: int) -> Peer:
        """The Python function walsh_transform. Out of place it allocates the result."""
        order, place = name.split()

        def bind(x: Tensor) -> Any:
            if place == "in":
                own = x.clone()
                return lambda i: ops.walsh_transform(own, order, inplace=True)
            return lambda i: ops.walsh_transform(x, order)

        return peers.transform(name, bind, order)

    def argument(self, shape: tuple[int, ...], load: int | None) -> Tensor:
        assert load is not None
        return torch.randn(load, *shape, device=self.device).to(self.dtype)

    def nbytes(self, ours: Peer, argument: Tensor) -> int:
        """x read once and written once."""
        return 2 * argument.nbytes

    def summary_title(self) -> str:
        return "geometric means over the sizes, peers against sequency out, over those they can do"

    def summary_text(self, rows: Sequence[Row]) -> str:
        """The share of memcpy of each of our variants, then the other peers against one of them."""
        variants = dict.fromkeys(row.ours for row in rows)
        shares = (f"{mean(row.speedup(MEMCPY) for row in rows if row.ours == name):.2f} {name}" for name in variants)
        parts = [f"of memcpy {', '.join(shares)}"]
        ours = [row for row in rows if row.ours == "sequency out"]
        for name in self.peers[1:]:
            speedup = mean(row.speedup(name) for row in ours)
            if speedup is not None:
                parts.append(f"{speedup:.1f} x {name}")
        return "; ".join(parts)

    def plotted(self, rows: Sequence[Row]) -> Sequence[Row]:
        return [row for row in rows if row.case["order"] == "sequency"]


@dataclass(frozen=True, kw_only=True)
class CudaWalshTransform(WalshTransform):
    """On another device: on a GPU as CUDA graphs over inputs of four times L2."""

    device: torch.device = CUDA
    threads: tuple[int | None, ...] = (None,)
    dtype: torch.dtype = torch.float16

    titles: ClassVar = without_threads(WalshTransform.titles)
    groups = ("rows",)
    peers: ClassVar[tuple[str, ...]] = (MEMCPY, DENSE, BUTTERFLY)

    def comments(self) -> list[str]:
        return [timing.GRAPHS] if self.device.type == "cuda" else []

    def competitors(self) -> dict[str, Maker]:
        makers = super().competitors()
        return {name: partial(self._over_copies, makers[name]) for name in (*self.variants, *self.peers)}

    def copies(self, peer: Peer, argument: Tensor) -> int:
        return timing.copies_needed(argument.nbytes, self.device)

    def _over_copies(self, make: Maker, size: int) -> Peer | None:
        """A competitor whose calls cycle through copies of x: one x would stay in L2."""
        peer = make(size)
        if peer is None:
            return None

        def bind(x: Tensor) -> Call:
            calls = [peer.bind(x.clone()) for _ in range(self.copies(peer, x))]
            return lambda i: calls[i % len(calls)](i)

        return Peer(bind)
