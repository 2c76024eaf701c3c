"""The settings of LAQuant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...ops.checks import check_int, check_one_of

__all__ = ["LaquantConfig"]


@dataclass(frozen=True)
class LaquantConfig:
    """The settings of a training.

    Attributes:
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or the input features of a layer.
        lookahead: 1 for the loss behind the next layer, 0 for the layer's own output.
        epochs: passes over the calibration text per layer.
        batch_size: sequences per step.
        lr_weights, lr_quantizer: learning rates of AdamW (betas 0.9 and 0.95, no decay). They fall to zero along a
            cosine.
        dtype: dtype that the layers compute in during training. bfloat16 takes a quarter of the time on CPUs with
            AVX512-BF16 or AMX. Weights, quantizers and streams are float32 in both cases.
        seed: of the order of the sequences.
        act_bits: of the resulting QuantLinear layers; 16 for weight only.
    """

    bits: int = 3
    group_size: int = 128
    lookahead: int = 1
    epochs: int = 2
    batch_size: int = 4
    lr_weights: float = 1e-5
    lr_quantizer: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    act_bits: int = 16

    def __post_init__(self) -> None:
        where = "LaquantConfig"
        check_one_of(where, "lookahead", self.lookahead, (0, 1), "1 looks one layer ahead")
        check_int(where, "epochs", self.epochs, 1, "2 are usual")
        check_int(where, "batch_size", self.batch_size, 1, "4 sequences are usual")
        check_one_of(where, "dtype", self.dtype, ("float32", "bfloat16"))
