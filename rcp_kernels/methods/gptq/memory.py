"""The memory that GPTQ takes on the device where the layers run."""

from __future__ import annotations

from itertools import accumulate

from ...models import Architecture
from .captured_layer import BATCH_TOKENS

__all__ = ["device_bytes"]

# The decoder layer's linear layers in the order in which they are quantized. Those of one step share a Hessian.
_STEPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
# Rounding to the nearest works on parts of this many weights, with this many bytes each.
_PART_WEIGHTS, _PART_BYTES = 1 << 22, 17


def device_bytes(architecture: Architecture, sequences: int, sequence: int) -> int:
    """Peak bytes on the device, without hidden states and kept outputs, which have a budget.

    Everything is float32 except for the factor of a Hessian, in float64. Weights of finished steps stay on the device
    until the decoder layer ends. The peak is in one of these phases of a step with w weights and a Hessian [K, K]:

    - a batch passes through the layer, beside the Hessian;
    - the Hessian is factored: 4 + 8 + 8 bytes an entry;
    - the step's weights are quantized: the Hessian and its factor (8 bytes an entry), and 10 bytes a weight;
    - errors are measured: again 8 bytes an entry, the original and the quantized weights, and temporaries.

    Args:
        architecture: of the model.
        sequences: number of calibration sequences.
        sequence: tokens of each.
    """
    shapes = architecture.shapes
    sizes = [[shapes[part][0] * shapes[part][1] for part in step] for step in _STEPS]
    finished = [0, *accumulate(map(sum, sizes))]
    tokens = min(sequences, max(1, BATCH_TOKENS // sequence)) * sequence
    batch = 4 * tokens * (6 * architecture.hidden_size + 4 * architecture.intermediate_size)
    peak = batch + 4 * finished[-1]
    for step, weights, done in zip(_STEPS, sizes, finished, strict=False):
        square = shapes[step[0]][1] ** 2
        last = weights[-1]
        errors = 8 * sum(weights) + max(7 * last, 4 * last + _PART_BYTES * min(last, _PART_WEIGHTS))
        phases = 4 * square + batch, 20 * square, 8 * square + 14 * sum(weights), 8 * square + errors
        peak = max(peak, 4 * done + max(phases))
    return peak
