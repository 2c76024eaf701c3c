"""The linear layer on a packed weight, a drop-in for a trained ``nn.Linear``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..formats import (
    INPUT_ORDER_VERSION,
    Geometry,
    ImportedWeight,
    PackedWeight,
    check_bits,
    check_group_size,
    check_input_order,
    kind_version,
    make_header,
    num_groups,
    row_bytes,
)
from ..ops import cuda_library
from ..ops.lut_linear import lut_linear
from ..ops.pack_weight import dequantize, pack_weight, unpack_weight
from ..ops.quantize_weight import quantize_weight
from ..ops.walsh_transform import transform_tables
from .online_rotation import OnlineRotation
from .rotated_linear import RotatedLinear

__all__ = ["QuantLinear"]

_Layer = TypeVar("_Layer", bound="QuantLinear")

# What torch's own modules ask: 0.1 us a call, where asking for the device of x takes 0.6.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

_BIAS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _pack(weight: PackedWeight) -> Tensor:
    """The backend's order of a weight; on the meta device, where no backend is, a stand-in without elements."""
    if weight.codes.is_meta:
        return torch.empty(0, dtype=torch.uint8, device="meta")
    return pack_weight(weight)


def type_of(module: object) -> str:
    """The name of an object's class for an error message, which says so where the object is quantized already."""
    name = type(module).__name__
    return f"{name}, which is quantized already" if isinstance(module, QuantLinear) else name


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that ``nn.Linear`` would compute with under ``torch.autocast``; x itself outside of it."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x
    # As autocast itself, which leaves integers and float64 alone.
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _stored(name: str) -> Any:
    """A tensor of ``state_dict`` as an attribute that can be read: torch's tools look its names up in the module."""

    def read(layer: QuantLinear) -> Tensor:
        if name == "format":
            return layer._header()
        if name != "rotation":
            return layer.packed_weight().state_dict()[name]
        if layer.input_rotation is None:
            raise AttributeError(name)  # nn.Module.__getattr__ is asked next, and says that there is none
        return layer.input_rotation.state()

    def refuse(layer: QuantLinear, value: object) -> None:
        raise AttributeError(
            f"QuantLinear: {name} must not be set, as the layer computes with a repacked copy of it, got "
            f"{type(value).__name__}; use load_state_dict or QuantLinear.from_state_dict (torch.func.functional_call "
            f"can replace the bias only)"
        )

    return property(read, refuse)


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with W packed in 2, 3 or 4 bits and x quantized per token on the way in.

    A new layer has an all-zero weight; use :meth:`from_linear`, :meth:`from_packed` or ``load_state_dict``. The weight
    is kept in the order of the running backend, in a buffer that ``state_dict`` and pickles never show: they hold the
    canonical tensors ``codes``, ``levels``, ``scales``, ``tensor_scale`` and ``format`` of docs/format.md. Casting the
    module with ``.to(dtype)`` or ``.half()`` casts the bias only; the output has the dtype of the input. There is no
    ``weight``: :meth:`dequantize` gives it.

    Gradients flow to x and bias, straight through the quantization of x; the packed weight is not trained.

    With an ``input_rotation`` the layer computes ``y = W' R x + bias``: x is rotated before it is quantized, and W' is
    the weight with the rotation folded in (``W' = W R^T`` for an equivalent layer; :meth:`from_linear` folds it). Then
    ``state_dict`` has a sixth tensor, ``rotation`` (:meth:`OnlineRotation.state`), and the rotation's signs if it has
    any, and a checkpoint and a layer whose rotations differ do not load.

    With an ``input_order`` column k of the packed weight belongs to ``x[..., input_order[k]]``: act-order checkpoints
    sort their columns so that those of a group are neighbours. The operator reorders x as it reads it, and
    ``state_dict`` has the order as another tensor. A layer has an input order or an input rotation, not both: nothing
    writes such a weight, and a rotation of reordered inputs mixes other entries than a rotation of the inputs.

    Under ``torch.autocast`` the input is cast, as ``nn.Linear``'s is, and the output has autocast's dtype.

    The tensors of ``state_dict`` can be read as attributes (``layer.codes``), each time as new tensors. They cannot be
    set: ``torch.func.functional_call`` raises an error that names the tensor if it is given one of them.

    Attributes:
        in_features, out_features: K and N.
        bits: bits a weight code.
        group_size: weights along K that share a table of levels.
        kind: of the weight it holds, "table" or "uniform" (:class:`rcp_kernels.PackedWeight`); that of a stored weight
            when it is loaded.
        act_bits: 4 or 8 bits an activation, or 16 for none quantized.
        act_clip: the share of a token's largest magnitude that 4 or 8 bits cover, in (0, 1].
        bias: Parameter [out_features] or None.
        input_rotation: OnlineRotation of in_features entries, or None.
        input_order: int64 [in_features], or None; like ``kind`` that of the weight that the layer holds.
    """

    packed: Tensor
    bias: nn.Parameter | None
    input_rotation: OnlineRotation | None
    input_order: Tensor | None
    codes = _stored("codes")
    levels = _stored("levels")
    scales = _stored("scales")
    tensor_scale = _stored("tensor_scale")
    format = _stored("format")
    rotation = _stored("rotation")

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
        """Make a layer of zeros; on the meta device, one that waits for ``load_state_dict(..., assign=True)``.

        Args:
            in_features: K, at least 1.
            out_features: N, at least 1.
            bits: 2, 3 or 4.
            group_size: 32, 64, 128 or in_features.
            act_bits: 4, 8 or 16.
            bias: whether to have one.
            act_clip: in (0, 1].
            input_rotation: of in_features entries, applied to x; kept, not copied. None for none.
            device: of the weight and bias.
            dtype: of the bias: float32, float16 or bfloat16; torch's default without it. float64 gives a float32
                bias, the widest that the kernels read.

        Raises:
            ValueError: an argument outside its set, or a rotation of another size.
            TypeError: a size that is not an int, an act_clip that is not a number, a dtype that is not a torch.dtype,
                or input_rotation is not an OnlineRotation.
        """
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"QuantLinear: {name} must be an int, got {size!r}; convert with int()")
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"QuantLinear: in_features and out_features must be at least 1, got {in_features} and {out_features}; "
                f"an empty layer has nothing to pack"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.bits = check_bits(bits)
        self.group_size = check_group_size(group_size, in_features)
        if isinstance(act_bits, bool) or not isinstance(act_bits, int) or act_bits not in (4, 8, 16):
            raise ValueError(
                f"QuantLinear: act_bits must be 4, 8 or 16, got {act_bits!r}; 16 leaves activations unquantized"
            )
        self.act_bits = act_bits
        clip: object = act_clip  # mypy does not count float as a Real; numpy's are
        if isinstance(clip, bool) or not isinstance(clip, Real):
            raise TypeError(
                f"QuantLinear: act_clip must be a number, got {act_clip!r}; 1.0 keeps the largest activation"
            )
        if not 0.0 < act_clip <= 1.0:
            raise ValueError(
                f"QuantLinear: act_clip must be in (0, 1], got {act_clip!r}; 1.0 keeps the largest activation"
            )
        self.act_clip = float(act_clip)
        if input_rotation is not None:
            if not isinstance(input_rotation, OnlineRotation):
                raise TypeError(
                    f"QuantLinear: input_rotation must be an OnlineRotation or None, got "
                    f"{type(input_rotation).__name__}; put any other module before the layer"
                )
            if input_rotation.size != in_features:
                raise ValueError(
                    f"QuantLinear: input_rotation must have size {in_features} (in_features), got "
                    f"{input_rotation.size}; make the rotation for this layer"
                )
        self.input_rotation = input_rotation
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(
                f"QuantLinear: dtype must be a torch.dtype, got {dtype!r}; pass torch.bfloat16, for example"
            )
        if dtype == torch.float64:
            dtype = torch.float32
        if dtype not in _BIAS_DTYPES:
            raise ValueError(
                f"QuantLinear: dtype must be float32, float16 or bfloat16, got {dtype}; it is the bias's, bits is the "
                f"weight's"
            )
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        groups = num_groups(in_features, group_size)
        codes = torch.zeros((out_features, row_bytes(in_features, bits, group_size)), dtype=torch.uint8, device=device)
        levels = torch.zeros((out_features, groups, 2**bits), dtype=torch.int8, device=device)
        scales = torch.zeros((out_features, groups), dtype=torch.float16, device=device)
        one = torch.ones((), dtype=torch.float32, device=device)
        weight = PackedWeight(codes, levels, scales, one, bits, group_size, in_features, out_features)
        self.kind = weight.kind
        self.register_buffer("packed", _pack(weight), persistent=False)
        self.register_buffer("input_order", None, persistent=False)

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
            act_bits: 4, 8 or 16.
            act_clip: in (0, 1].
            input_rotation: of in_features entries, already folded into weight; kept, not copied. None for none.
            input_order: int64 [in_features], copied: column k of weight belongs to ``x[..., input_order[k]]``. None for
                columns in the order of x.

        Raises:
            ValueError: the weight breaks a rule of the format, bias has a wrong shape or no values, the rotation
                another size, input_order is no permutation of the inputs, or there is a rotation beside it.
            TypeError: weight is not a PackedWeight, bias is not a floating point tensor, or input_rotation is not an
                OnlineRotation.
        """
        if not isinstance(weight, PackedWeight):
            raise TypeError(
                f"QuantLinear: weight must be a PackedWeight, got {type(weight).__name__}; make one with "
                f"quantize_weight"
            )
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(
                f"QuantLinear: bias must be a floating point tensor or None, got {type(bias).__name__}; convert with "
                f"torch.as_tensor"
            )
        weight.validate()
        module = cls(
            weight.in_features,
            weight.out_features,
            bits=weight.bits,
            group_size=weight.group_size,
            act_bits=act_bits,
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
        if bias is not None:
            if tuple(bias.shape) != (weight.out_features,):
                raise ValueError(
                    f"QuantLinear: bias must have shape ({weight.out_features},) (out_features), got "
                    f"{tuple(bias.shape)}; pass the bias of the same layer"
                )
            if not bias.is_floating_point():
                raise TypeError(f"QuantLinear: bias must be floating point, got {bias.dtype}; convert with .float()")
            if bias.is_meta and not weight.codes.is_meta:
                raise ValueError("QuantLinear: bias is on the meta device and has no values; load the checkpoint first")
            copy = bias.detach().clone().to(weight.codes.device)
            if copy.dtype == torch.float64:
                copy = copy.to(torch.float32)
            module.bias = nn.Parameter(copy, requires_grad=bias.requires_grad)
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
        """Quantize the weight of a linear layer, which is left as it is.

        Args:
            linear: with a floating point weight.
            bits, group_size, levels: as :func:`rcp_kernels.quantize_weight`.
            act_bits: 4, 8 or 16.
            act_clip: in (0, 1].
            input_rotation: of in_features entries: folded into the weight in float64 before it is quantized, and
                applied to the input, so that the layer still stands for ``linear``. Kept, not copied. None for none,
                or for that of a :class:`RotatedLinear`.

        Raises:
            TypeError, ValueError: as :func:`rcp_kernels.quantize_weight` and :meth:`from_packed`; linear is not an
                nn.Linear.
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
                    "QuantLinear: input_rotation must be left out for a RotatedLinear, which has one, got another; "
                    "fold it into the layer first"
                )
            input_rotation = linear.input_rotation
        elif input_rotation is not None:
            weight = input_rotation.rotate_weight(weight, "input")
        packed = quantize_weight(weight, bits, group_size, levels)
        module = cls.from_packed(packed, linear.bias, act_bits, act_clip, input_rotation)
        return module.train(linear.training)

    @classmethod
    def from_imported(cls, imported: ImportedWeight, act_bits: int = 4, act_clip: float = 1.0) -> QuantLinear:
        """Make a layer of what an importer read, with its bias and its input order.

        Args:
            imported: of :mod:`rcp_kernels.integrations.importers`.
            act_bits: 4, 8 or 16.
            act_clip: in (0, 1].

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
        """Make a layer of the tensors that another one's ``state_dict`` gave, whatever its bits, groups and kind.

        All but the treatment of activations is read from the tensors: sizes, bits, group_size and kind from ``format``,
        and the rotation, the input order and the bias where there are such keys.

        Args:
            state_dict: with the keys of one layer; other keys are ignored.
            prefix: of the layer's keys, ``"model.layers.0.mlp.up_proj."`` say.
            act_bits: 4, 8 or 16.
            act_clip: in (0, 1].

        Returns:
            The layer, on the device of codes. The bias has the stored dtype, and takes a gradient.

        Raises:
            ValueError: a tensor is missing or breaks a rule of docs/format.md; or as :meth:`from_packed`.
        """
        name = prefix.rstrip(".")
        try:
            weight, order = PackedWeight.read(state_dict, prefix)
            rotation = _read_rotation(state_dict, prefix)
            layer = cls.from_packed(weight, state_dict.get(prefix + "bias"), act_bits, act_clip, rotation, order)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") if name else error from None
        return layer if layer.bias is None else layer.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x (float32, float16 or bfloat16) or autocast's."""
        try:
            if _is_any_autocast_enabled():
                x = autocast_input(x)
            # Straight from the dicts: nn.Module.__getattr__, twice, would double the 2 us that the module adds.
            rotation: OnlineRotation | None = self._modules.get("input_rotation")  # type: ignore[assignment]
            base = permutation = None
            rotation_group = 0
            if rotation is not None:
                if rotation.heads is None and rotation.signs is None:
                    # Inside the operator, where the rotated token stays in cache: bit-equal to rotation(x) before it.
                    rotation_group = rotation.group_size
                    base, permutation = transform_tables("QuantLinear", x, rotation_group, rotation.order)
                else:
                    x = rotation(x)
            buffers = self._buffers
            return lut_linear(
                x,
                buffers["packed"],  # type: ignore[arg-type]
                self._parameters["bias"],
                self.out_features,
                self.in_features,
                self.bits,
                self.group_size,
                self.act_bits,
                self.act_clip,
                base,
                permutation,
                rotation_group,
                buffers["input_order"],
            )
        except (AttributeError, RuntimeError):
            # Looked at only here: a check of every x would be paid by every call.
            if isinstance(x, Tensor):
                raise
            raise TypeError(
                f"QuantLinear: x must be a tensor [..., {self.in_features}], got {type(x).__name__}; convert with "
                f"torch.as_tensor"
            ) from None

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Only called for what is not an ordinary attribute, and not on the way of forward.
        if name == "weight":
            raise AttributeError(
                "QuantLinear: there is no float weight to read, it is packed; use .dequantize(), or keep this layer in "
                "floating point (skip of quantize_model) where other code reads its weight"
            )
        return super().__getattr__(name)

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        """What .to(), .cuda(), .cpu() and to_empty() call. Each device has an order of its own, so that a weight that
        changes devices travels in the canonical format."""
        before = self.packed.device
        try:
            after = fn(self.packed.new_empty(0)).device
        except (AssertionError, RuntimeError) as error:
            # torch's own errors for a GPU that is not there: which kind depends on what is missing.
            if re.search("cuda|nvidia", str(error), re.IGNORECASE):
                cuda_library.require("QuantLinear")
            raise
        if before != after:
            if after.type == "cuda":
                cuda_library.require("QuantLinear")
            if "meta" not in (before.type, after.type):
                self._buffers["packed"] = pack_weight(self.packed_weight().to(after))
        return super()._apply(fn, recurse)

    @property
    def format_version(self) -> int:
        """The version of docs/format.md that a reader of this layer's state needs."""
        return kind_version(self.kind) if self.input_order is None else INPUT_ORDER_VERSION

    def _header(self) -> Tensor:
        return make_header(
            self.format_version, self.kind, Geometry(self.out_features, self.in_features, self.bits, self.group_size)
        )

    def packed_weight(self) -> PackedWeight:
        """The weight in the canonical format and of the layer's kind, as new tensors.

        Its columns are those of the stored weight: with an ``input_order`` it is for ``x[..., input_order]``.
        """
        weight = unpack_weight(self.packed, self.out_features, self.in_features, self.bits, self.group_size)
        return weight.as_uniform() if self.kind == "uniform" else weight

    def _hold(self, weight: PackedWeight, input_order: Tensor | None = None) -> None:
        self.kind = weight.kind
        self.packed = _pack(weight)
        self.input_order = input_order

    def _check_order_alone(self, order: Tensor | None) -> None:
        if order is not None and self.input_rotation is not None:
            raise ValueError(
                f"QuantLinear: input_order must be None in a layer with an input_rotation, got an order of "
                f"{len(order)} inputs beside {self.input_rotation}; a rotation of reordered inputs is not that of the "
                f"inputs: quantize the rotated weight without act-order"
            )

    def dequantize(self) -> Tensor:
        """The weight as float32 [out_features, in_features], its columns in the order of x."""
        weight = dequantize(self.packed, self.out_features, self.in_features, self.bits, self.group_size)
        if self.input_order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.input_order, weight)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, act_clip={self.act_clip}, "
            f"bias={self.bias is not None}"
            + (f", kind={self.kind}" if self.kind != "table" else "")
            + (", input_order=True" if self.input_order is not None else "")
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.packed_weight().state_dict(prefix, self.input_order))
        if self.input_rotation is not None:
            destination[prefix + "rotation"] = self.input_rotation.state()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = [prefix + name for name in PackedWeight.KEYS]
        own_keys = keys if self.input_rotation is None else [*keys, prefix + "rotation"]
        known = {*keys, prefix + "rotation", prefix + "input_order"}
        if any(key in state_dict for key in known):
            # A part of a packed weight is an error even where strict=False allows a layer to be left out as a whole;
            # so is a weight that wants its input rotated in another way than this layer does.
            try:
                weight, order = PackedWeight.read(state_dict, prefix)
                self._check_geometry(weight)
                self._check_rotation(state_dict, prefix)
                self._check_order_alone(order)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            else:
                self._load_packed(weight, order, assign=local_metadata.get("assign_to_params_buffers", False))
        elif strict:
            missing_keys.extend(own_keys)
        rest = {key: value for key, value in state_dict.items() if key not in known}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _check_geometry(self, weight: PackedWeight) -> None:
        for name in ("in_features", "out_features", "bits", "group_size"):
            if getattr(weight, name) != getattr(self, name):
                raise ValueError(
                    f"{name} of the stored weight must be the layer's, {getattr(self, name)}, got "
                    f"{getattr(weight, name)}; construct the layer with {name}={getattr(weight, name)} or load another "
                    f"file"
                )

    def _check_rotation(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        state = state_dict.get(prefix + "rotation")
        stored = "none" if state is None else repr(OnlineRotation.from_state(state))
        own = "none"
        if self.input_rotation is not None:
            own = repr(OnlineRotation.from_state(self.input_rotation.state()))
        if stored != own:
            raise ValueError(
                f"the input_rotation of the stored weight must be the layer's, {own}, got {stored}; construct the "
                f"layer with the stored one or load another file"
            )
        signs = self.input_rotation is not None and self.input_rotation.signs is not None
        if signs != (prefix + "input_rotation.signs" in state_dict):
            raise ValueError(
                f"the input_rotation of the stored weight must have signs if the layer's has, and only then, got "
                f"{'none' if signs else 'signs'}; construct the layer with{'out' if signs else ''} them or load "
                f"another file"
            )

    def _load_packed(self, weight: PackedWeight, order: Tensor | None, assign: bool) -> None:
        device = self.packed.device
        if device.type == "meta":
            if not assign:
                warnings.warn(
                    "QuantLinear: loading into a layer on the meta device does nothing; pass assign=True to "
                    "load_state_dict, or call to_empty() first",
                    stacklevel=2,
                )
                return
            device = weight.codes.device
        tensors = {name: getattr(weight, name).to(device).contiguous() for name in PackedWeight.TENSORS}
        self._hold(replace(weight, **tensors), None if order is None else order.to(device, copy=True))

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies carry the canonical tensors: the backend's order may change between versions."""
        state = self.__dict__.copy()
        if not self.packed.is_meta:
            state["_buffers"] = {name: buffer for name, buffer in self._buffers.items() if name != "packed"}
            state["packed_weight"] = self.packed_weight().state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.pop("packed_weight", None)
        super().__setstate__(state)
        self.__dict__.setdefault("kind", "table")  # pickles of before there were kinds
        self._buffers.setdefault("input_order", None)  # and of before there were orders
        self._non_persistent_buffers_set.add("input_order")
        if stored is None:
            return
        if stored["codes"].is_meta:  # torch.load(..., map_location="meta"): the format has no values either
            self._buffers["packed"] = torch.empty(0, dtype=torch.uint8, device="meta")
        else:
            self._buffers["packed"] = pack_weight(PackedWeight.from_state_dict(stored))


def _read_rotation(state_dict: Mapping[str, Tensor], prefix: str) -> OnlineRotation | None:
    """The input rotation of a stored layer, with its signs."""
    state, signs = state_dict.get(prefix + "rotation"), state_dict.get(prefix + "input_rotation.signs")
    if state is None:
        if signs is not None:
            raise ValueError(
                "QuantLinear: input_rotation.signs must come with a rotation, got none; the checkpoint is incomplete"
            )
        return None
    rotation = OnlineRotation.from_state(state)
    if signs is None:
        return rotation
    return OnlineRotation(rotation.size, rotation.group_size, rotation.order, rotation.heads, signs)
