"""torchao: ``quantize_(model, RcpWeightConfig(...))`` replaces linear layers by :class:`QuantLinear`.

Importing this module registers the config's handler with torchao's module registry (docs/integrations/torchao.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import extras
from ..nn import QuantLinear, RotatedLinear
from ..nn.quantize_model import count_hooks, is_more_than_linear
from ..ops.quantize_weight import quantize_weight

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ModuleNotFoundError as error:
    raise extras.MissingExtra("not installed: torchao; run: pip install torchao") from error

__all__ = ["RcpWeightConfig"]


@dataclass
class RcpWeightConfig(AOBaseConfig):
    """The settings of the QuantLinear for every linear layer that ``quantize_`` selects.

    Attributes:
        bits: bits a weight code: 2, 3 or 4.
        group_size: weights along K that share a table of levels: 32, 64, 128, or -1 for a whole row.
        act_bits: 4 or 8 bits an activation; 16 means that activations are not quantized.
        levels: ``"kmeans"`` or ``"uniform"``, as :func:`rcp_kernels.quantize_weight`.
        act_clip: the share of a token's largest magnitude that 4 or 8 bits cover, in (0, 1].
    """

    bits: int = 4
    group_size: int = 128
    act_bits: int = 16
    levels: str = "kmeans"
    act_clip: float = 1.0


@register_quantize_module_handler(RcpWeightConfig)
def _quantize_module(module: nn.Module, config: RcpWeightConfig) -> nn.Module:
    """Turn a linear layer into a QuantLinear; the object stays the same.

    torchao's handlers replace the weight inside a module. ``quantize_`` cannot insert a new module for the model
    itself, or for the second name of a layer that a parent has twice.

    Raises:
        TypeError, ValueError: as :func:`rcp_kernels.quantize_weight`; the module is no plain nn.Linear.
    """
    if isinstance(module, QuantLinear):
        return module  # a layer with a second name
    if is_more_than_linear(module):
        raise ValueError(
            f"RcpWeightConfig: a module must be a plain nn.Linear, got {type(module).__name__} with "
            f"{count_hooks(module)} hooks; leave it out by quantize_'s filter_fn"
        )
    assert isinstance(module, nn.Linear)
    group_size = module.in_features if config.group_size == -1 else config.group_size
    rotation = module.input_rotation if isinstance(module, RotatedLinear) else None
    weight = quantize_weight(module.weight, config.bits, group_size, config.levels)
    packed = QuantLinear.from_packed(weight, module.bias, config.act_bits, config.act_clip, rotation)
    packed.train(module.training)
    module.__class__ = QuantLinear  # type: ignore[assignment]
    module.__dict__ = packed.__dict__
    return module
