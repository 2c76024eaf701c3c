"""The settings of an RCP training, its presets, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...ops.checks import check_clip, check_int, check_one_of
from .block_reconstruction import BlockConfig
from .optimizer import OPTIMIZERS

__all__ = ["PRESETS", "RcpConfig", "TrainResult"]


@dataclass(frozen=True)
class RcpConfig:
    """All settings of a training except the model and the text.

    Attributes:
        bits, group_size: of the weights.
        act_bits, act_clip: of the inputs of the linear layers; 16 bits leave them in float.
        kv_bits, kv_clip: of keys and values; 16 bits leave them in float.
        init: of the levels: "uniform", "clip" or "kmeans".
        learn_clip, learn_partition: whether clip and partition of the quantizers are trained. None trains the partition
            with 2 bits.
        loss: one of ``distillation.LOSSES``.
        blocks: settings of phase one, layer by layer; None skips phase one.
        steps: updates of phase two, end to end.
        batch: sequences per update, over all processes.
        micro_batch: sequences per forward pass.
        weight_lr, quantizer_lr: peak learning rates of AdamW.
        beta2: of AdamW; beta1 is 0.9, the weight decay 0.
        optimizer: of phase two, one of ``optimizer.OPTIMIZERS``. "adamw" is torch's, in one fused kernel on CUDA.
            "adamw8bit" is torchao's: its states have 8 bits instead of 32, with one scale for 256 values. Phase one has
            the states of one layer only, and always takes "adamw".
        activation_checkpointing: in phase two, keep the inputs of decoder layers only, and compute each layer a second
            time in the backward pass. This takes a third more time, and the results are the same bits.
        warmup, floor: steps up to the peak rate, and the share of the peak at the end of the cosine.
        max_grad_norm: limit for the norm of all gradients together.
        workers: number of threads on CPUs. Each thread computes one micro-batch at a time on one core; 1 leaves threads
            to torch. Two cores that share one matrix wait for each other at every operator, and for other jobs on
            either core. A sum of two gradients does not depend on their order: with ``batch = 2 * micro_batch`` and two
            workers a run repeats bit for bit.
        bf16: compute in bfloat16 where autocast does. Weights, quantizers and AdamW stay float32.
        validate_every, checkpoint_every: steps.
        seed: of all random numbers.
    """

    bits: int = 2
    group_size: int = 128
    act_bits: int = 4
    act_clip: float = 1.0
    kv_bits: int = 4
    kv_clip: float = 1.0
    init: str = "kmeans"
    learn_clip: bool = True
    learn_partition: bool | None = None
    loss: str = "cakld"
    blocks: BlockConfig | None = field(default_factory=BlockConfig)
    steps: int = 220
    batch: int = 8
    micro_batch: int = 4
    weight_lr: float = 4e-4
    quantizer_lr: float = 2e-3
    beta2: float = 0.95
    optimizer: str = "adamw"
    activation_checkpointing: bool = False
    warmup: int = 10
    floor: float = 0.05
    max_grad_norm: float = 1.0
    workers: int = 2
    bf16: bool = True
    validate_every: int = 20
    checkpoint_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "micro_batch": 1, "workers": 1, "validate_every": 1, "checkpoint_every": 1}
        for name, value in least.items():
            check_int("RcpConfig", name, getattr(self, name), value, "raise it")
        check_one_of("RcpConfig", "optimizer", self.optimizer, OPTIMIZERS, "adamw is usual")
        check_clip("RcpConfig", self.act_clip, "act_clip")
        check_clip("RcpConfig", self.kv_clip, "kv_clip")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RcpConfig:
        """The inverse of :meth:`to_dict`. Missing fields get their defaults.

        Raises:
            ValueError: an unknown field.
        """
        fields = dict(fields)
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"RcpConfig: fields must be among {sorted(known)}, got {unknown}; check the spelling")
        if isinstance(fields.get("blocks"), Mapping):
            fields["blocks"] = BlockConfig(**fields["blocks"])
        return cls(**fields)


# Windows have the length of those for perplexity: a student trained on 256 tokens gained less from a second 256 than
# the float model does (2.50 times the float model's perplexity in windows of 256, 2.63 times in windows of 512).
_SEQUENCES = {"sequence": 512, "batch": 4, "micro_batch": 2, "blocks": {"sequences": 48, "batch": 2}}

# Perplexity on validation windows (held out) after 40 updates with a global Walsh rotation, for three pairs of weight
# and quantizer rates: 4e-4 and 2e-3 83.2 (62.6), 2e-4 and 1e-3 77.7 (57.0), 1e-4 and 1e-3 77.1 (55.3). With 1.2e-3 and
# 2e-3 it rose, to 554 at update 20. The rates here lie between the last two pairs, for a run fifteen times as long.
_RATES = {"weight_lr": 1.5e-4, "quantizer_lr": 1e-3}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {**_SEQUENCES, "steps": 340, "validate_every": 40},
    "full": {**_SEQUENCES, **_RATES, "steps": 600, "validate_every": 100, "checkpoint_every": 100},
}
"""Training budgets: tokens per sequence, and fields of `RcpConfig` that differ from its defaults (docs/rcp.md)."""


@dataclass
class TrainResult:
    """Result of :func:`train`.

    Attributes:
        steps: updates, including those before a resume.
        tokens: trained on in phase two.
        best_step: update with the lowest validation perplexity. The student has the weights of this update.
        best_perplexity: on the validation windows.
        confidence: mean largest probability of the teacher, the m of CAKLD.
        cpu_seconds: of this process, including those before a resume.
    """

    steps: int
    tokens: int
    best_step: int
    best_perplexity: float
    confidence: float
    cpu_seconds: float
