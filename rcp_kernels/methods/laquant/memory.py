"""The memory that LAQuant takes on the device where the layers run."""

from __future__ import annotations

from ...models import Architecture
from .config import LaquantConfig

__all__ = ["device_bytes"]

# Bytes a weight of the trained layer: weight, gradient, both moments of AdamW, and temporaries of its step.
_STEP = 21
# The same during the forward and backward pass: no gradient yet, but the quantized weight.
_PASS = 16
# Bytes a level of the trained layer's tables during that pass: levels, stored values, bounds and steps.
_LEVEL = 16


def device_bytes(architecture: Architecture, config: LaquantConfig, sequence: int) -> int:
    """Peak bytes on the device, without the two streams, which have a budget.

    The trained layer, the next one in float32, and the activations of a batch for the backward pass.

    Args:
        architecture: of the model.
        config: its batch_size and lookahead.
        sequence: tokens of a calibration sequence.
    """
    weights = architecture.layer_weights
    layers = 1 + config.lookahead
    activations = 4 * (8 * architecture.hidden_size + 5 * architecture.intermediate_size)
    kept = layers * config.batch_size * sequence * activations
    levels = weights * 2**config.bits // config.group_size
    return max(_STEP * weights, _PASS * weights + _LEVEL * levels + kept) + 4 * weights * config.lookahead
