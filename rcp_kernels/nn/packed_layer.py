"""The packed weight of a layer: how the layer holds it, moves it between devices, and stores it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..formats import INPUT_ORDER_VERSION, Geometry, PackedWeight, kind_version, make_header
from ..ops import cuda_library
from ..ops.pack_weight import dequantize, pack_weight, unpack_weight
from .online_rotation import OnlineRotation

__all__ = ["PackedLayer", "read_rotation"]

_Layer = TypeVar("_Layer", bound="PackedLayer")


def _pack(weight: PackedWeight) -> Tensor:
    """A weight in the backend's order; on the meta device, which has no backend, a tensor without elements."""
    if weight.codes.is_meta:
        return torch.empty(0, dtype=torch.uint8, device="meta")
    return pack_weight(weight)


def _stored(name: str) -> Any:
    """A read-only attribute for a tensor of ``state_dict``: torch's tools look the names up in the module."""

    def read(layer: PackedLayer) -> Tensor:
        if name == "format":
            return make_header(layer.format_version, layer.kind, layer.geometry)
        if name != "rotation":
            return layer.packed_weight().state_dict()[name]
        if layer.input_rotation is None:
            raise AttributeError(name)  # Python then calls nn.Module.__getattr__, which raises the final error
        return layer.input_rotation.state()

    def refuse(layer: PackedLayer, value: object) -> None:
        raise AttributeError(
            f"QuantLinear: {name} must not be set, as the layer computes with a repacked copy of it, got "
            f"{type(value).__name__}; use load_state_dict or QuantLinear.from_state_dict (torch.func.functional_call "
            f"can replace the bias only)"
        )

    return property(read, refuse)


class PackedLayer(nn.Module):
    """The packed weight of a :class:`QuantLinear`, its input order, and its input rotation.

    ``packed`` is the weight in the order of the running backend. ``state_dict`` and pickles hold the canonical tensors
    instead, as the backend's order may change between versions.
    """

    geometry: Geometry
    kind: str
    packed: Tensor
    input_rotation: OnlineRotation | None
    input_order: Tensor | None
    codes = _stored("codes")
    levels = _stored("levels")
    scales = _stored("scales")
    tensor_scale = _stored("tensor_scale")
    format = _stored("format")
    rotation = _stored("rotation")

    @property
    def format_version(self) -> int:
        """The version of docs/format.md that a reader of this layer's state needs."""
        return kind_version(self.kind) if self.input_order is None else INPUT_ORDER_VERSION

    def packed_weight(self) -> PackedWeight:
        """The weight in the canonical format and of the layer's kind, as new tensors.

        Its columns are those of the stored weight: with an ``input_order`` it is for ``x[..., input_order]``.
        """
        weight = unpack_weight(self.packed, self.geometry)
        return weight.as_uniform() if self.kind == "uniform" else weight

    def dequantize(self) -> Tensor:
        """The weight as float32 [out_features, in_features], its columns in the order of x."""
        weight = dequantize(self.packed, self.geometry)
        if self.input_order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.input_order, weight)

    def _hold(self, weight: PackedWeight, input_order: Tensor | None = None) -> None:
        self.kind = weight.kind
        self.register_buffer("packed", _pack(weight), persistent=False)
        self.register_buffer("input_order", input_order, persistent=False)

    def _check_order_alone(self, order: Tensor | None) -> None:
        if order is not None and self.input_rotation is not None:
            raise ValueError(
                f"QuantLinear: input_order must be None in a layer with an input_rotation, got an order of "
                f"{len(order)} inputs beside {self.input_rotation}; quantize the rotated weight without act-order"
            )

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        """Move the layer. .to(), .cuda(), .cpu() and to_empty() call this.

        Each device has its own order of a weight. A weight that changes devices is unpacked and packed again.
        """
        before = self.packed.device
        try:
            after = fn(self.packed.new_empty(0)).device
        except (AssertionError, RuntimeError) as error:
            # The type of torch's error for a missing GPU depends on the missing part.
            if re.search("cuda|nvidia", str(error), re.IGNORECASE):
                cuda_library.require("QuantLinear")
            raise
        if before != after:
            if after.type == "cuda":
                cuda_library.require("QuantLinear")
            if "meta" not in (before.type, after.type):
                self._buffers["packed"] = pack_weight(self.packed_weight().to(after))
        return super()._apply(fn, recurse)

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
            # strict=False allows a checkpoint without the layer. A part of the layer, or a weight for an input that is
            # rotated in another way, is an error even then.
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
        for name, own, stored in zip(Geometry._fields, self.geometry, weight.geometry, strict=True):
            if stored != own:
                raise ValueError(
                    f"{name} of the stored weight must be the layer's, {own}, got {stored}; construct the layer with "
                    f"{name}={stored} or load another file"
                )

    def _check_rotation(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        found = read_rotation(state_dict, prefix)
        stored, own = ("none" if x is None else repr(x) for x in (found, self.input_rotation))
        if stored != own:
            raise ValueError(
                f"the input_rotation of the stored weight must be the layer's, {own}, got {stored}; construct the "
                f"layer with the stored one or load another file"
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
        state = self.__dict__.copy()
        if not self.packed.is_meta:
            state["_buffers"] = {name: buffer for name, buffer in self._buffers.items() if name != "packed"}
            state["packed_weight"] = self.packed_weight().state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.pop("packed_weight", None)
        super().__setstate__(state)
        # Older pickles have no kind, no input order or no geometry.
        self.__dict__.setdefault("kind", "table")
        self.__dict__.setdefault("geometry", Geometry(*(self.__dict__[name] for name in Geometry._fields)))
        self._buffers.setdefault("input_order", None)
        self._non_persistent_buffers_set.add("input_order")
        if stored is None:
            return
        if stored["codes"].is_meta:  # torch.load(..., map_location="meta") gives a format without values
            self._buffers["packed"] = torch.empty(0, dtype=torch.uint8, device="meta")
        else:
            self._buffers["packed"] = pack_weight(PackedWeight.from_state_dict(stored))


def read_rotation(state_dict: Mapping[str, Tensor], prefix: str) -> OnlineRotation | None:
    """The input rotation of a stored layer, with its signs, or None.

    Raises:
        ValueError: the rotation is damaged, or there are signs without a rotation.
    """
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


# torch.load(weights_only=True), the default, builds only the classes in its list. Pickled layers hold a Geometry.
torch.serialization.add_safe_globals([Geometry])
