"""The linear layer on a packed weight, a drop-in for a trained ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..formats import (
    Geometry,
    ImportedWeight,
    PackedWeight,
    check_bits,
    check_group_size,
    check_input_order,
    num_groups,
    row_bytes,
)
from ..ops.checks import check_clip, check_float, check_int, check_one_of
from ..ops.lut_linear import ACT_BITS, NO_ROTATION, lut_linear
from ..ops.quantize_weight import quantize_weight
from .online_rotation import OnlineRotation, check_input_rotation
from .packed_layer import PackedLayer, read_rotation
from .rotated_linear import RotatedLinear

__all__ = ["QuantLinear", "autocast_input", "type_of"]

# torch's modules ask this too. It takes 0.1 us a call; asking for the device of x takes 0.6.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def type_of(module: object) -> str:
    """The class name of an object for an error message, which says if the object is quantized already."""
    name = type(module).__name__
    return f"{name}, which is quantized already" if isinstance(module, QuantLinear) else name


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that ``nn.Linear`` would compute with under ``torch.autocast``; x itself outside of it."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x
    # autocast leaves integers and float64 as they are.
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _zero_weight(geometry: Geometry, device: torch.device | str | None) -> PackedWeight:
    rows, columns, bits, group_size = geometry
    groups = num_groups(columns, group_size)
    codes = torch.zeros((rows, row_bytes(columns, bits, group_size)), dtype=torch.uint8, device=device)
    levels = torch.zeros((rows, groups, 2**bits), dtype=torch.int8, device=device)
    scales = torch.zeros((rows, groups), dtype=torch.float16, device=device)
    one = torch.ones((), dtype=torch.float32, device=device)
    return PackedWeight(codes, levels, scales, one, bits, group_size, columns, rows)


def _copy_bias(bias: Tensor, weight: PackedWeight) -> nn.Parameter:
    """A copy of the bias on the device of the weight, checked. float64 becomes float32."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        found = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"QuantLinear: bias must be a floating point tensor or None, got {found}; convert it")
    if tuple(bias.shape) != (weight.out_features,):
        raise ValueError(
            f"QuantLinear: bias must have shape ({weight.out_features},) (out_features), got {tuple(bias.shape)}; pass "
            f"the bias of the same layer"
        )
    if bias.is_meta and not weight.codes.is_meta:
        raise ValueError("QuantLinear: bias is on the meta device and has no values; load the checkpoint first")
    copy = bias.detach().clone().to(weight.codes.device)
    if copy.dtype == torch.float64:
        copy = copy.to(torch.float32)
    return nn.Parameter(copy, requires_grad=bias.requires_grad)


class QuantLinear(PackedLayer):
    """``y = x W^T + bias`` with W packed in 2, 3 or 4 bits and x quantized per token on the way in.

    A new layer has an all-zero weight. Use :meth:`from_linear`, :meth:`from_packed` or ``load_state_dict``. The layer
    keeps the weight in the order of the running backend. ``state_dict`` and pickles hold the canonical tensors
    ``codes``, ``levels``, ``scales``, ``tensor_scale`` and ``format`` of docs/format.md instead. ``.to(dtype)`` and
    ``.half()`` cast the bias only; the output has the dtype of the input. There is no ``weight``: :meth:`dequantize`
    computes it. Gradients flow to x and bias, straight through the quantization of x; the packed weight is not trained.

    With an ``input_rotation`` the layer computes ``y = W' R x + bias``: x is rotated before it is quantized, and W' is
    the weight with the rotation folded in. ``W' = W R^T`` gives the function of W; :meth:`from_linear` computes it.
    ``state_dict`` then has a tensor ``rotation`` (:meth:`OnlineRotation.state`), and the rotation's signs if there are
    any. A checkpoint does not load into a layer with another rotation.

    With an ``input_order`` column k of the packed weight belongs to ``x[..., input_order[k]]``. Act-order checkpoints
    sort their columns in this way to make those of a group neighbours. The operator reorders x as it reads it.
    ``state_dict`` then has the order as a tensor. A layer cannot have both an input order and an input rotation.

    Under ``torch.autocast`` the input is cast, as ``nn.Linear``'s is, and the output has autocast's dtype.

    The tensors of ``state_dict`` can be read as attributes (``layer.codes``), each time as new tensors. They cannot be
    set: ``torch.func.functional_call`` raises an error that names the tensor.

    Attributes:
        in_features, out_features: K and N.
        bits: bits a weight code.
        group_size: weights along K that share a table of levels.
        geometry: (out_features, in_features, bits, group_size).
        kind: of the weight, "table" or "uniform" (:class:`rcp_kernels.PackedWeight`). Loading a weight sets it.
        act_bits: 4 or 8 bits an activation; 16 means that activations are not quantized.
        act_clip: the share of a token's largest magnitude that 4 or 8 bits cover, in (0, 1].
        bias: Parameter [out_features] or None.
        input_rotation: OnlineRotation of in_features entries, or None.
        input_order: int64 [in_features], or None. Loading a weight sets it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 2,
        group_size: int = 128,
        act_bits: int = 4,
        bias: bool = True,
        act_clip: float = 1.0,
        input_rotation: OnlineRotation | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros. On the meta device it needs ``load_state_dict(..., assign=True)``.

        Args:
            in_features: K, at least 1.
            out_features: N, at least 1.
            bits: 2, 3 or 4.
            group_size: 32, 64, 128 or in_features.
            act_bits: 4, 8 or 16.
            bias: whether to have one.
            act_clip: in (0, 1].
            input_rotation: of in_features entries, applied to x; not copied. None for none.
            device: of the weight and bias.
            dtype: of the bias: float32, float16 or bfloat16; default: torch's default dtype. float64 gives a float32
                bias, the widest that the kernels read.

        Raises:
            ValueError: an argument outside its set, or a rotation of another size.
            TypeError: a dtype that is not a torch.dtype, or input_rotation is not an OnlineRotation.
        """
        super().__init__()
        check_int("QuantLinear", "in_features", in_features, remedy="an empty layer has nothing to pack")
        check_int("QuantLinear", "out_features", out_features, remedy="an empty layer has nothing to pack")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = check_bits(bits)
        self.group_size = check_group_size(group_size, in_features)
        self.geometry = Geometry(out_features, in_features, bits, group_size)
        check_one_of("QuantLinear", "act_bits", act_bits, ACT_BITS, "16 leaves activations unquantized")
        self.act_bits = act_bits
        check_clip("QuantLinear", act_clip, "act_clip")
        self.act_clip = float(act_clip)
        if input_rotation is not None:
            check_input_rotation("QuantLinear", input_rotation, in_features)
        self.input_rotation = input_rotation
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(
                f"QuantLinear: dtype must be a torch.dtype, got {dtype!r}; pass torch.bfloat16, for example"
            )
        if dtype == torch.float64:
            dtype = torch.float32
        check_float("QuantLinear", "dtype", dtype, "dtype is that of the bias, bits that of the weight")
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        self._hold(_zero_weight(self.geometry, device))

    @classmethod
    def from_packed(
        cls,
        weight: PackedWeight,
        bias: Tensor | None = None,
        act_bits: int = 4,
        act_clip: float = 1.0,
        input_rotation: OnlineRotation | None = None,
        input_order: Tensor | None = None,
    ) -> QuantLinear:
        """Make a layer of a packed weight.

        Args:
            weight: checked before use.
            bias: floating point [out_features], copied; a Parameter keeps its requires_grad. float64 becomes float32,
                the widest that the kernels read. None for no bias.
            act_bits, act_clip: as the constructor.
            input_rotation: of in_features entries, already folded into weight; not copied. None for none.
            input_order: int64 [in_features], copied: column k of weight belongs to ``x[..., input_order[k]]``. None for
                columns in the order of x.

        Raises:
            ValueError: the weight breaks a rule of the format, bias has a wrong shape or no values, the rotation has
                another size, input_order is no permutation of the inputs, or there is a rotation beside it.
            TypeError: weight is not a PackedWeight, bias is not a floating point tensor, or input_rotation is not an
                OnlineRotation.
        """
        if not isinstance(weight, PackedWeight):
            raise TypeError(
                f"QuantLinear: weight must be a PackedWeight, got {type(weight).__name__}; make one with "
                f"quantize_weight"
            )
        weight.validate()
        module = cls(
            weight.in_features,
            weight.out_features,
            weight.bits,
            weight.group_size,
            act_bits,
            bias=False,
            act_clip=act_clip,
            input_rotation=input_rotation,
            device="meta",
        )
        if input_order is not None:
            try:
                input_order = check_input_order(input_order, weight.in_features).to(weight.codes.device, copy=True)
            except ValueError as error:
                raise ValueError(f"QuantLinear: {error}") from None
            module._check_order_alone(input_order)
        module._hold(weight, input_order)
        module.bias = None if bias is None else _copy_bias(bias, weight)
        return module

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 2,
        group_size: int = 128,
        act_bits: int = 4,
        levels: str | Tensor = "kmeans",
        act_clip: float = 1.0,
        input_rotation: OnlineRotation | None = None,
    ) -> QuantLinear:
        """Quantize the weight of a linear layer, which does not change.

        Args:
            linear: with a floating point weight.
            bits, group_size, levels: as :func:`rcp_kernels.quantize_weight`.
            act_bits, act_clip: as the constructor.
            input_rotation: of in_features entries, not copied. It is folded into the weight in float64 before the
                quantization, and applied to the input: the layer still computes the function of ``linear``. None for
                none, or for that of a :class:`RotatedLinear`.

        Raises:
            TypeError, ValueError: as :func:`rcp_kernels.quantize_weight` and :meth:`from_packed`; linear is not an
                nn.Linear; linear has an input_rotation, and another is passed.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"QuantLinear: linear must be an nn.Linear, got {type_of(linear)}; for a weight by itself use "
                f"quantize_weight and from_packed"
            )
        weight = linear.weight
        if isinstance(linear, RotatedLinear):
            if input_rotation is not None:
                raise ValueError(
                    f"QuantLinear: linear must have no input_rotation where a second one is passed, got a "
                    f"{type(linear).__name__} and {input_rotation}; do not pass input_rotation"
                )
            input_rotation = linear.input_rotation
        elif input_rotation is not None:
            weight = input_rotation.rotate_weight(weight, "input")
        packed = quantize_weight(weight, bits, group_size, levels)
        module = cls.from_packed(packed, linear.bias, act_bits, act_clip, input_rotation)
        return module.train(linear.training)

    @classmethod
    def from_imported(cls, imported: ImportedWeight, act_bits: int = 4, act_clip: float = 1.0) -> QuantLinear:
        """Make a layer of an imported weight, with its bias and its input order.

        Args:
            imported: of :mod:`rcp_kernels.integrations.importers`.
            act_bits, act_clip: as the constructor.

        Raises:
            TypeError: imported is not an ImportedWeight.
            ValueError: as :meth:`from_packed`.
        """
        if not isinstance(imported, ImportedWeight):
            raise TypeError(
                f"QuantLinear: imported must be an ImportedWeight, got {type(imported).__name__}; for a PackedWeight "
                f"use from_packed"
            )
        return cls.from_packed(imported.weight, imported.bias, act_bits, act_clip, input_order=imported.permutation)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "", act_bits: int = 4, act_clip: float = 1.0
    ) -> QuantLinear:
        """Make a layer of the tensors of another layer's ``state_dict``, with any bits, group_size and kind.

        Sizes, bits, group_size and kind come from ``format``; rotation, input order and bias from their keys. Only the
        treatment of activations is not stored.

        Args:
            state_dict: with the keys of one layer; other keys are ignored.
            prefix: of the layer's keys, for example ``"model.layers.0.mlp.up_proj."``.
            act_bits, act_clip: as the constructor.

        Returns:
            The layer, on the device of codes. The bias has the stored dtype and requires a gradient.

        Raises:
            ValueError: a tensor is missing or breaks a rule of docs/format.md; or as :meth:`from_packed`.
        """
        name = prefix.rstrip(".")
        try:
            weight, order = PackedWeight.read(state_dict, prefix)
            rotation = read_rotation(state_dict, prefix)
            layer = cls.from_packed(weight, state_dict.get(prefix + "bias"), act_bits, act_clip, rotation, order)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") if name else error from None
        return layer if layer.bias is None else layer.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x (float32, float16 or bfloat16) or autocast's."""
        try:
            if _is_any_autocast_enabled():
                x = autocast_input(x)
            # From the dicts: two calls of nn.Module.__getattr__ would double the 2 us that the module adds.
            rotation: OnlineRotation | None = self._modules.get("input_rotation")  # type: ignore[assignment]
            inside = NO_ROTATION
            if rotation is not None:
                x, inside = rotation.apply_or_defer(x)
            buffers = self._buffers
            return lut_linear(
                x,
                buffers["packed"],  # type: ignore[arg-type]
                self._parameters["bias"],
                self.geometry,
                self.act_bits,
                self.act_clip,
                inside,
                buffers["input_order"],
            )
        except (AttributeError, RuntimeError):
            # Checked only here: a check before the call would cost every call.
            if isinstance(x, Tensor):
                raise
            raise TypeError(
                f"QuantLinear: x must be a tensor [..., {self.in_features}], got {type(x).__name__}; convert with "
                f"torch.as_tensor"
            ) from None

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Python calls this only for names that are no ordinary attribute; forward does not.
        if name == "weight":
            raise AttributeError(
                "QuantLinear: there is no float weight to read, it is packed; use .dequantize(), or keep this layer in "
                "floating point (skip of quantize_model) where other code reads its weight"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, act_clip={self.act_clip}, "
            f"bias={self.bias is not None}"
            + (f", kind={self.kind}" if self.kind != "table" else "")
            + (", input_order=True" if self.input_order is not None else "")
        )
