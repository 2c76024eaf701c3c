"""The linear layer on a packed weight, a drop-in for a trained ``nn.Linear``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import PackedWeight, check_bits, check_group_size, num_groups, row_bytes
from ..ops.lut_linear import lut_linear
from ..ops.pack_weight import pack_weight, unpack_weight
from ..quantize import quantize_weight

__all__ = ["QuantLinear"]


def _pack(weight: PackedWeight) -> Tensor:
    """The backend's order of a weight; on the meta device, where no backend is, a stand-in without elements."""
    if weight.codes.is_meta:
        return torch.empty(0, dtype=torch.uint8, device="meta")
    return pack_weight(weight)


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with W packed in 2, 3 or 4 bits and x quantized per token on the way in.

    A new layer has an all-zero weight; use :meth:`from_linear`, :meth:`from_packed` or ``load_state_dict``. The weight
    is kept in the order of the running backend, in a buffer that ``state_dict`` and pickles never show: they hold the
    canonical tensors ``codes``, ``levels``, ``scales``, ``tensor_scale`` and ``format`` of docs/format.md. Casting the
    module with ``.to(dtype)`` or ``.half()`` casts the bias only; the output has the dtype of the input.

    Gradients flow to x and bias, straight through the quantization of x; the packed weight is not trained.

    Attributes:
        in_features, out_features: K and N.
        bits: bits a weight code.
        group_size: weights along K that share a table of levels.
        act_bits: 4 or 8 bits an activation, or 16 for none quantized.
        act_clip: the share of a token's largest magnitude that 4 or 8 bits cover, in (0, 1].
        bias: Parameter [out_features] or None.
    """

    packed: Tensor
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
            device: of the weight and bias.
            dtype: of the bias.

        Raises:
            ValueError: an argument outside its set.
        """
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"QuantLinear: in_features and out_features must be at least 1, got {in_features} and {out_features}; "
                f"an empty layer has nothing to pack"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.bits = check_bits(bits)
        self.group_size = check_group_size(group_size, in_features)
        if act_bits not in (4, 8, 16):
            raise ValueError(
                f"QuantLinear: act_bits must be 4, 8 or 16, got {act_bits}; 16 leaves activations unquantized"
            )
        self.act_bits = act_bits
        if not 0.0 < act_clip <= 1.0:
            raise ValueError(
                f"QuantLinear: act_clip must be in (0, 1], got {act_clip}; 1.0 keeps the largest activation"
            )
        self.act_clip = float(act_clip)
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        groups = num_groups(in_features, group_size)
        codes = torch.zeros((out_features, row_bytes(in_features, bits, group_size)), dtype=torch.uint8, device=device)
        levels = torch.zeros((out_features, groups, 2**bits), dtype=torch.int8, device=device)
        scales = torch.zeros((out_features, groups), dtype=torch.float16, device=device)
        one = torch.ones((), dtype=torch.float32, device=device)
        weight = PackedWeight(codes, levels, scales, one, bits, group_size, in_features, out_features)
        self.register_buffer("packed", _pack(weight), persistent=False)

    @classmethod
    def from_packed(
        cls, weight: PackedWeight, bias: Tensor | None = None, act_bits: int = 4, act_clip: float = 1.0
    ) -> QuantLinear:
        """Make a layer of a packed weight.

        Args:
            weight: checked before use.
            bias: floating point [out_features], copied; a Parameter keeps its requires_grad. None for no bias.
            act_bits: 4, 8 or 16.
            act_clip: in (0, 1].

        Raises:
            ValueError: the weight breaks a rule of the format, or bias has a wrong shape.
            TypeError: bias is not floating point.
        """
        weight.validate()
        module = cls(
            weight.in_features,
            weight.out_features,
            bits=weight.bits,
            group_size=weight.group_size,
            act_bits=act_bits,
            bias=False,
            act_clip=act_clip,
            device="meta",
        )
        module.packed = _pack(weight)
        if bias is not None:
            if tuple(bias.shape) != (weight.out_features,):
                raise ValueError(
                    f"QuantLinear: bias must have shape ({weight.out_features},) (out_features), got "
                    f"{tuple(bias.shape)}; pass the bias of the same layer"
                )
            if not bias.is_floating_point():
                raise TypeError(f"QuantLinear: bias must be floating point, got {bias.dtype}; convert with .float()")
            copy = bias.detach().clone().to(weight.codes.device)
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
    ) -> QuantLinear:
        """Quantize the weight of a linear layer, which is left as it is.

        Args:
            linear: with a floating point weight.
            bits, group_size, levels: as :func:`rcp_kernels.quantize_weight`.
            act_bits: 4, 8 or 16.
            act_clip: in (0, 1].

        Raises:
            TypeError, ValueError: as :func:`rcp_kernels.quantize_weight` and :meth:`from_packed`.
        """
        weight = quantize_weight(linear.weight, bits, group_size, levels)
        module = cls.from_packed(weight, linear.bias, act_bits, act_clip)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x (float32, float16 or bfloat16)."""
        # Straight from the dicts: nn.Module.__getattr__, twice, would double the 2 us that the module adds.
        return lut_linear(
            x,
            self._buffers["packed"],  # type: ignore[arg-type]
            self._parameters["bias"],
            self.out_features,
            self.in_features,
            self.bits,
            self.group_size,
            self.act_bits,
            self.act_clip,
        )

    def packed_weight(self) -> PackedWeight:
        """The weight in the canonical format, as new tensors."""
        return unpack_weight(self.packed, self.out_features, self.in_features, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """The weight as float32 [out_features, in_features]."""
        return self.packed_weight().dequantize()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, act_clip={self.act_clip}, "
            f"bias={self.bias is not None}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.packed_weight().state_dict(prefix))

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
        if any(key in state_dict for key in keys):
            # A part of a packed weight is an error even where strict=False allows a layer to be left out as a whole.
            try:
                weight = PackedWeight.from_state_dict(state_dict, prefix)
                self._check_geometry(weight)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            else:
                self._load_packed(weight, assign=local_metadata.get("assign_to_params_buffers", False))
        elif strict:
            missing_keys.extend(keys)
        rest = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _check_geometry(self, weight: PackedWeight) -> None:
        for name in ("in_features", "out_features", "bits", "group_size"):
            if getattr(weight, name) != getattr(self, name):
                raise ValueError(
                    f"{name} of the stored weight must be the layer's, {getattr(self, name)}, got "
                    f"{getattr(weight, name)}; construct the layer with {name}={getattr(weight, name)} or load another "
                    f"file"
                )

    def _load_packed(self, weight: PackedWeight, assign: bool) -> None:
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
        self.packed = _pack(
            PackedWeight(
                **tensors,
                bits=self.bits,
                group_size=self.group_size,
                in_features=self.in_features,
                out_features=self.out_features,
            )
        )

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
        if stored is not None:
            self._buffers["packed"] = pack_weight(PackedWeight.from_state_dict(stored))
