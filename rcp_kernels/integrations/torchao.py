"""torchao: ``quantize_(model, RcpWeightConfig(...))`` puts :class:`QuantLinear` where linear layers were.

Importing this module registers the config's handler with torchao's module registry (docs/integrations/torchao.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import extras
from ..nn import QuantLinear, RotatedLinear
from ..ops.quantize_weight import quantize_weight

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ModuleNotFoundError as error:
    raise extras.MissingExtra("not installed: torchao; run: pip install torchao") from error

__all__ = ["RcpWeightConfig"]


@dataclass
class RcpWeightConfig(AOBaseConfig):
    """What every linear layer that ``quantize_`` selects becomes.

    Attributes:
        bits: bits a weight code: 2, 3 or 4.
        group_size: weights along K that share a table of levels: 32, 64, 128, or -1 for a whole row.
        act_bits: 4 or 8 bits an activation, or 16 for none quantized.
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
    """Turn a linear layer into a QuantLinear, the object itself.

    torchao's own handlers exchange the weight inside a module. A new module in its place would be lost where
    ``quantize_`` cannot put it: the model itself, and the second name of a layer that a parent has twice.

    Raises:
        TypeError, ValueError: as :func:`rcp_kernels.quantize_weight`; the module is no plain nn.Linear.
    """
    if isinstance(module, QuantLinear):
        return module  # met again under a second name
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) not in (nn.Linear, RotatedLinear) or any(hooks) or "forward" in vars(module):
        raise ValueError(
            f"RcpWeightConfig: a module must be a plain nn.Linear, got {type(module).__name__} with "
            f"{sum(map(len, hooks))} hooks; leave it out by quantize_'s filter_fn"
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
