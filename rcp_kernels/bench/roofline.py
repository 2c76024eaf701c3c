"""A roofline of lut_linear on cards that are not here: the time of a layer by its bytes and by its instructions.

Every time that comes from here is a model, not a measurement: the largest of what DRAM, the warp schedulers, and the
tensor cores need at their published rates, with nothing for latency, launches, caches or clocks below boost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LABEL = "model, not measured"
SCHEDULERS = 4  # of a multiprocessor, sm_75 to sm_120; each issues one warp instruction a cycle
# Operations of one IMMA.16832 (16 x 8 x 32 multiply-adds), and of one HMMA.16816.
IMMA_OPERATIONS, HMMA_OPERATIONS = 2 * 16 * 8 * 32, 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Card:
    """Published figures; rates are dense, at boost clock."""

    name: str
    arch: int
    multiprocessors: int
    boost_ghz: float
    dram_gb_s: float
    int8_tops: float
    fp16_tflops: float  # float32 accumulation
    l2_mb: float


# A100: NVIDIA A100 datasheet (2021) and "NVIDIA A100 Tensor Core GPU Architecture" whitepaper, table 1 (SXM4).
# RTX 3090, A6000: "NVIDIA Ampere GA102 GPU Architecture" whitepaper v2.1, appendices A and B (RTX A6000 datasheet).
# RTX 4090: "NVIDIA Ada GPU Architecture" whitepaper v2.1, appendix A. L4: NVIDIA L4 datasheet.
# H100: NVIDIA H100 datasheet (SXM5), clock of its tensor rates. RTX 5090: "NVIDIA RTX Blackwell GPU Architecture"
# whitepaper v1.1, appendix A.
CARDS = (
    Card("A100-40", 80, 108, 1.410, 1555, 624.0, 312.0, 40),
    Card("A100-80", 80, 108, 1.410, 2039, 624.0, 312.0, 40),
    Card("RTX 3090", 86, 82, 1.695, 936, 284.0, 71.0, 6),
    Card("RTX A6000", 86, 84, 1.800, 768, 309.7, 154.8, 6),
    Card("RTX 4090", 89, 128, 2.520, 1008, 660.6, 165.2, 72),
    Card("L4", 89, 58, 2.040, 300, 242.0, 121.0, 48),
    Card("H100", 90, 132, 1.830, 3352, 1979.0, 989.4, 50),
    Card("RTX 5090", 120, 170, 2.407, 1792, 838.0, 209.5, 96),
)


def card(name: str) -> Card:
    """One of :data:`CARDS`.

    Raises:
        KeyError: there is none of the name.
    """
    for found in CARDS:
        if found.name == name:
            return found
    raise KeyError(
        f"roofline: the card must be one of {', '.join(c.name for c in CARDS)}, got {name!r}; add it to CARDS"
    )


# Linear layers of a decoder layer, (out, in, how many); LLaMA-2 papers' table of models, and the models' config.json.
MODELS = {
    "LLaMA-2-7B": ((4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1)),
    "LLaMA-2-13B": ((5120, 5120, 4), (13824, 5120, 2), (5120, 13824, 1)),
    "LLaMA-3-8B": ((4096, 4096, 2), (1024, 4096, 2), (14336, 4096, 2), (4096, 14336, 1)),
    "Qwen3-4B": ((4096, 2560, 1), (1024, 2560, 2), (2560, 4096, 1), (9728, 2560, 2), (2560, 9728, 1)),
}
LAYERS = {"LLaMA-2-7B": 32, "LLaMA-2-13B": 40, "LLaMA-3-8B": 32, "Qwen3-4B": 36}
LM_HEADS = {"LLaMA-2-7B": (32000, 4096), "LLaMA-2-13B": (32000, 5120), "LLaMA-3-8B": (128256, 4096)}
LM_HEADS["Qwen3-4B"] = (151936, 2560)


@dataclass(frozen=True)
class Work:
    """What a call of a kernel asks of a card."""

    dram_bytes: float
    warp_instructions: float
    alu_instructions: float = 0  # of these, integer and logic operations
    tensor_operations: float = 0
    tensor_is_int8: bool = True
    blocks: int = 0  # 0: evenly over all multiprocessors


@dataclass(frozen=True)
class Estimate:
    """Microseconds by each bound. ``issue`` has the work evenly on all multiprocessors, ``busiest`` that of the one
    with the most blocks, which is what ends last."""

    dram: float
    issue: float
    busiest: float
    alu: float
    tensor: float

    @property
    def bounds(self) -> dict[str, float]:
        return {"DRAM": self.dram, "issue": self.busiest, "tensor": self.tensor}

    @property
    def time(self) -> float:
        return max(self.bounds.values())

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def issue_margin(self) -> float:
        """How many times the instructions could be issued in the time of DRAM, spread evenly."""
        return self.dram / self.issue if self.issue else math.inf


def estimate(work: Work, on: Card) -> Estimate:
    """Microseconds by each bound, model, not measured."""
    cycles_us = on.boost_ghz * 1e3
    issue = work.warp_instructions / (on.multiprocessors * SCHEDULERS * cycles_us)
    # An ALU takes a warp instruction every other cycle (CUDA C++ Programming Guide, "Arithmetic Instructions": 64
    # results of logic, shifts and compares per cycle and multiprocessor).
    alu = 2 * work.alu_instructions / (on.multiprocessors * SCHEDULERS * cycles_us)
    uneven = math.ceil(work.blocks / on.multiprocessors) * on.multiprocessors / work.blocks if work.blocks else 1.0
    rate = on.int8_tops if work.tensor_is_int8 else on.fp16_tflops
    return Estimate(
        dram=work.dram_bytes / (on.dram_gb_s * 1e3),
        issue=issue,
        busiest=issue * uneven,
        alu=alu,
        tensor=work.tensor_operations / (rate * 1e6),
    )


# Assumed, not counted: a float16 GEMV issues for 8 weights one 16-byte load, half a load of x from shared memory, 8
# conversions and 8 FFMA; what is left (reduction, loop) is taken as 1/16.
FP16_INSTRUCTIONS_PER_WEIGHT = (1 + 0.5 + 8 + 8) / 8 * (1 + 1 / 16)


def fp16_gemv(rows: int, columns: int) -> Work:
    """A float16 GEMV that reads each weight once."""
    weights = rows * columns
    return Work(2 * weights + 2 * (rows + columns), weights * FP16_INSTRUCTIONS_PER_WEIGHT / 32)


# Assumed from the published description, not counted: for each 2-bit weight a shift and a mask of the code, an
# address and a load from the group's four halves, half a load and an unpacking (2) of the 4-bit activation, half an
# HFMA2; and for each block of 128 threads 10 shuffles and adds, a barrier, 15 of set-up and the copy of its tables:
# 40 a warp.
PUBLISHED_INSTRUCTIONS_PER_WEIGHT, PUBLISHED_INSTRUCTIONS_PER_BLOCK = 2 + 2 + 0.5 + 2 + 0.5, 4 * 40
PUBLISHED_BITS = 2.5  # 2 and four halves for 128 weights


def published_gemv(rows: int, columns: int) -> Work:
    """The published kernel's scheme: one block per output, a table of four halves per group of 128."""
    weights = rows * columns
    instructions = weights * PUBLISHED_INSTRUCTIONS_PER_WEIGHT / 32 + rows * PUBLISHED_INSTRUCTIONS_PER_BLOCK
    return Work(weights * PUBLISHED_BITS / 8 + columns / 2 + 2 * rows, instructions, blocks=rows)


@dataclass(frozen=True)
class Decode:
    """Weights that one token of a model reads, in bytes."""

    fp16_bytes: float
    packed_bytes: float
    lm_head_bytes: float

    @property
    def ratio(self) -> float:
        """Bound of the speed-up over float16 by weight traffic, float16 lm_head in both."""
        return (self.fp16_bytes + self.lm_head_bytes) / (self.packed_bytes + self.lm_head_bytes)


def decode_traffic(model: str, bits_per_weight: float) -> Decode:
    """Weight traffic of one decoded token at batch 1; KV cache and norms are not counted.

    Args:
        bits_per_weight: of the linear layers, tables and scales included.
    """
    weights = sum(n * k * times for n, k, times in MODELS[model]) * LAYERS[model]
    rows, columns = LM_HEADS[model]
    return Decode(2.0 * weights, weights * bits_per_weight / 8, 2.0 * rows * columns)
