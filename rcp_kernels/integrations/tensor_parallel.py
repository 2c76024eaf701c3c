"""Column- and row-parallel QuantLinear for ``torch.distributed.tensor.parallel.parallelize_module``.

These are Megatron-LM's two divisions of a linear layer (Shoeybi et al. 2019), as torch's ColwiseParallel and
RowwiseParallel for ``nn.Linear``. docs/integrations/tensor_parallel.md says how exact each is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional

from ..formats import PackedWeight
from ..nn.quant_linear import QuantLinear, autocast_input
from ..nn.quantize_model import count_hooks
from ..nn.sharding import shard_columns, shard_rotation, shard_rows
from ..ops.checks import FLOAT_DTYPES

__all__ = ["ColumnParallelLinear", "RcpColwiseParallel", "RcpRowwiseParallel", "RowParallelLinear"]

_Layouts = tuple[Placement, ...]
_Parallel = TypeVar("_Parallel", bound="_ParallelLinear")


class _Style(ParallelStyle):
    """The common part of the two styles: layouts as in torch's ColwiseParallel and RowwiseParallel."""

    _default_input: Placement
    _default_output: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """As ``torch.distributed.tensor.parallel.ColwiseParallel`` and ``RowwiseParallel``.

        Args:
            input_layouts: of an input that is no DTensor. None: the same input on all ranks (Replicate()) for
                RcpColwiseParallel, this rank's inputs (Shard(-1)) for RcpRowwiseParallel.
            output_layouts: None: this rank's outputs (Shard(-1)) for RcpColwiseParallel, all outputs on all ranks
                (Replicate()) for RcpRowwiseParallel. Replicate() gathers the former; Shard(1) of
                [batch, tokens, out_features] scatters the tokens of the latter.
            use_local_output: return a plain tensor instead of a DTensor.
        """
        super().__init__()
        self.input_layouts: _Layouts = (input_layouts or self._default_input,)
        self.output_layouts: _Layouts = (output_layouts or self._default_output,)
        self.use_local_output = use_local_output

    def _become(self, cls: type[_Parallel], layer: QuantLinear, shard: QuantLinear, mesh: DeviceMesh) -> _Parallel:
        """Turn a layer into a module of another class, in place, as parallelize_module does not change the parent."""
        in_features, out_features, training = layer.in_features, layer.out_features, layer.training
        vars(layer).clear()
        module: nn.Module = layer
        module.__class__ = cls
        assert isinstance(module, cls)
        nn.Module.__init__(module)
        module.shard = shard
        module.in_features, module.out_features = in_features, out_features
        module._mesh = mesh
        module._input_layouts, module._output_layouts = self.input_layouts, self.output_layouts
        module._use_local_output = self.use_local_output
        return module.train(training)


class RcpColwiseParallel(_Style):
    """Divide the outputs of a :class:`QuantLinear` among the ranks: bit-equal to the undivided layer.

    Every rank has all inputs, and reorders or rotates and quantizes them as one process does.
    """

    _default_input, _default_output = Replicate(), Shard(-1)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, rank, world = _check("RcpColwiseParallel", module, device_mesh)
        weight = shard_rows(layer.packed_weight(), rank, world)
        bias = layer.bias
        if bias is not None:
            rows = weight.out_features
            bias = nn.Parameter(bias.detach()[rank * rows : (rank + 1) * rows], requires_grad=bias.requires_grad)
        shard = QuantLinear.from_packed(
            weight, bias, layer.act_bits, layer.act_clip, layer.input_rotation, layer.input_order
        )
        return self._become(ColumnParallelLinear, layer, shard, device_mesh)


class RcpRowwiseParallel(_Style):
    """Divide the inputs of a :class:`QuantLinear` among the ranks, and sum the partial outputs in float32.

    A cut must lie between groups of the weight, and between blocks of an input rotation. A layer with an input order is
    refused, because the inputs of a group are then on several ranks. With 4- or 8-bit activations the ranks first agree
    on the scale of each token; their integers are then those of one process.
    """

    _default_input, _default_output = Shard(-1), Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, rank, world = _check("RcpRowwiseParallel", module, device_mesh)
        if layer.input_order is not None:
            raise ValueError(
                f"RcpRowwiseParallel: the layer must have no input_order, as each rank has neighbouring inputs and a "
                f"group needs inputs of all ranks, got an order of {layer.in_features} inputs; divide its outputs with "
                f"RcpColwiseParallel, or keep the whole layer on each rank"
            )
        weight = shard_columns(layer.packed_weight(), rank, world)
        rotation = shard_rotation(layer.input_rotation, rank, world)
        if world > 1 and layer.act_bits < 16:
            weight = _with_zero_group(weight)
        shard = QuantLinear.from_packed(weight, None, layer.act_bits, layer.act_clip)
        bias = layer.bias
        parallel = self._become(RowParallelLinear, layer, shard, device_mesh)
        parallel.bias = bias
        parallel.input_rotation = rotation
        return parallel


class _ParallelLinear(nn.Module):
    """The module that replaces a QuantLinear on each rank.

    Attributes:
        shard: the QuantLinear of this rank's part.
        in_features, out_features: of the undivided layer.
    """

    shard: QuantLinear
    in_features: int
    out_features: int
    _mesh: DeviceMesh
    _input_layouts: _Layouts
    _output_layouts: _Layouts
    _use_local_output: bool

    def _enter(self, x: Tensor, wanted: Placement, gradient: Placement) -> Tensor:
        """This rank's tensor of x in the layout ``wanted``. Its gradient has the layout ``gradient``."""
        if not isinstance(x, DTensor):
            # DTensor's steps cost more than a small layer. Skip them where they would change nothing.
            if self._input_layouts == (wanted,) and (
                wanted == gradient or not (torch.is_grad_enabled() and x.requires_grad)
            ):
                return x
            x = DTensor.from_local(x, self._mesh, self._input_layouts, run_check=False)
        return x.redistribute(placements=(wanted,)).to_local(grad_placements=(_positive(gradient, x.dim()),))

    def _leave(self, y: Tensor) -> Tensor:
        assert isinstance(y, DTensor)
        y = y.redistribute(placements=self._output_layouts)
        return y.to_local() if self._use_local_output else y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ranks={self._mesh.size()}, "
            f"input_layouts={self._input_layouts}, output_layouts={self._output_layouts}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A QuantLinear whose outputs are divided among the ranks (:class:`RcpColwiseParallel`)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features / ranks] or the layout of output_layouts, in the dtype of x."""
        y = self.shard(self._enter(x, Replicate(), Partial()))
        if self._use_local_output and self._output_layouts == (Shard(-1),):
            return y
        return self._leave(DTensor.from_local(y, self._mesh, (Shard(-1),), run_check=False))


class RowParallelLinear(_ParallelLinear):
    """A QuantLinear whose inputs are divided among the ranks (:class:`RcpRowwiseParallel`).

    The operator computes a token's scale from the largest magnitude of its inputs. With 4- or 8-bit activations this
    must be the largest magnitude on all ranks. It is the first entry of an extra group, whose levels in ``shard`` are
    zeros.

    Attributes:
        bias: Parameter [out_features], the same on every rank, or None.
        input_rotation: of this rank's inputs, or None.
    """

    bias: nn.Parameter | None
    input_rotation: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features / ranks] or the layout of input_layouts -> [..., out_features], in x's or autocast's dtype.

        Raises:
            ValueError: an x of another width or dtype. NaN or Inf in an x to quantize raises on every rank.
        """
        local = self._enter(x, Shard(-1), Shard(-1))
        width = self.in_features // self._mesh.size()
        # The operator cannot check these: it gets float32, and the extra group would fill up a short x.
        if local.dim() < 1 or local.shape[-1] != width or local.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"RowParallelLinear: this rank's part of x must be float32, float16 or bfloat16 with {width} features "
                f"in its last dimension (in_features / ranks), got {local.dtype} {tuple(local.shape)} with layout "
                f"{self._input_layouts[0]}; check x, and input_layouts of RcpRowwiseParallel"
            )
        if torch._C._is_any_autocast_enabled():
            local = autocast_input(local)
            # The shard's inputs and outputs are float32 from here on.
            with torch.autocast(local.device.type, enabled=False):
                return self._multiply(local)
        return self._multiply(local)

    def _multiply(self, local: Tensor) -> Tensor:
        if self.input_rotation is not None:
            local = self.input_rotation(local)
        # float32 in and out: rounding a partial sum to x.dtype would break docs/numerics.md.
        values = local.to(torch.float32)
        spare = self.shard.in_features - local.shape[-1]
        if spare:
            values = torch.cat((values, functional.pad(self._largest(values), (0, spare - 1))), dim=-1)
        partial = DTensor.from_local(self.shard(values), self._mesh, (Partial(),), run_check=False)
        y: Tensor = partial.redistribute(placements=self._output_layouts)
        if self.bias is not None:
            y = y + DTensor.from_local(self.bias.to(torch.float32), self._mesh, (Replicate(),), run_check=False)
        return self._leave(y.to(local.dtype))

    def _largest(self, values: Tensor) -> Tensor:
        """[..., 1]: each token's largest magnitude on all ranks; Inf on all ranks if one has NaN or Inf.

        If one rank alone raised an error, the others would wait for it forever.
        """
        own = values.detach().abs().amax(dim=-1, keepdim=True)
        own = torch.where(own.isfinite(), own, torch.inf)
        largest = DTensor.from_local(own, self._mesh, (Partial("max"),), run_check=False)
        return largest.redistribute(placements=(Replicate(),)).to_local()


def _positive(placement: Placement, dimensions: int) -> Placement:
    """The placement with a dimension counted from the start, which to_local needs."""
    return Shard(placement.dim % dimensions) if isinstance(placement, Shard) else placement


def _check(style: str, module: nn.Module, mesh: DeviceMesh) -> tuple[QuantLinear, int, int]:
    """The layer, this process's rank in the mesh, and the number of ranks."""
    if not isinstance(module, QuantLinear):
        raise TypeError(
            f"{style}: the module must be a QuantLinear, got {type(module).__name__}; quantize the model first, and "
            f"use torch's styles for layers in floating point"
        )
    if count_hooks(module) or "forward" in vars(module):
        raise ValueError(
            f"{style}: the layer must have no hooks and no forward in the instance, which it would lose, got "
            f"{count_hooks(module)} hooks; register them after parallelize_module"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f'{style}: the mesh must have one dimension, got {mesh.ndim}; pass the dimension to divide over: mesh["tp"]'
        )
    if module.packed.device.type != mesh.device_type:
        raise ValueError(
            f"{style}: the layer must be on a device of the mesh, {mesh.device_type}, got {module.packed.device}; move "
            f"the model there, or load its weights, first"
        )
    return module, mesh.get_local_rank(), mesh.size()


def _with_zero_group(weight: PackedWeight) -> PackedWeight:
    """The same weight with group_size more columns, all zero."""
    return replace(
        weight,
        codes=functional.pad(weight.codes, (0, weight.group_size * weight.bits // 8)),
        levels=functional.pad(weight.levels, (0, 0, 0, 1)),
        scales=functional.pad(weight.scales, (0, 1)),
        in_features=weight.in_features + weight.group_size,
    )
