"""Quantized models in vLLM: the plugin that vLLM loads by its entry point group ``vllm.general_plugins``.

The checkpoint is that of :mod:`rcp_kernels.checkpoint`. docs/integrations/vllm.md says which features work, and which
interfaces of vLLM the plugin uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..checkpoint import QUANT_METHOD
from ..checkpoint import QuantizationConfig as StoredConfig
from ..formats import (
    FORMAT_VERSION,
    INPUT_ORDER_VERSION,
    PackedWeight,
    check_group_size,
    merge_rows,
    num_groups,
    row_bytes,
)
from ..models.families import FAMILIES
from ..nn import OnlineRotation, QuantLinear
from ..ops.lut_linear import lut_linear

extras.require("vllm")

from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config  # noqa: E402
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # noqa: E402
from vllm.model_executor.utils import set_weight_attrs  # noqa: E402

__all__ = ["RcpLinearMethod", "RcpQuantizationConfig", "register"]

_SHARDS = {"q": 0, "k": 1, "v": 2}
# The layer whose input R4 rotates, the only layer with a rotation in vLLM.
_ROTATED = "down_proj"


class RcpQuantizationConfig(QuantizationConfig):
    """``quantization_config`` of config.json, with the interface of vLLM.

    Attributes:
        stored: the fields of config.json.
        kept: names, in vLLM's model, of the linear layers in floating point.
    """

    def __init__(self, stored: StoredConfig) -> None:
        """Wrap the fields of config.json.

        Raises:
            ValueError: the rotation needs an operation between vLLM's layers, or a layer has an input order.
        """
        super().__init__()
        if stored.format_version >= INPUT_ORDER_VERSION:
            raise ValueError(
                f"RcpQuantizationConfig: format_version must be below {INPUT_ORDER_VERSION} in vLLM, got "
                f"{stored.format_version}: a layer of the model has an input_order (act-order), which the plugin does "
                f"not apply; run the model with transformers, or quantize it without act-order"
            )
        rotation = stored.rotation
        if rotation is not None and rotation.rotation != "none":
            family = FAMILIES.get(rotation.model_type)
            if family is not None and family.attention_output_norm is not None:
                raise ValueError(
                    f"RcpQuantizationConfig: rotation must be none for a model of type {rotation.model_type!r} in "
                    f"vLLM, got {rotation.rotation!r}, which must run after norms inside vLLM; quantize it with "
                    f"--rotation none"
                )
            if rotation.tied:
                raise ValueError(
                    f"RcpQuantizationConfig: the output head of a model with rotation {rotation.rotation!r} must not "
                    f"be tied to the embedding in vLLM, got one that is: it rotates around the final norm inside vLLM; "
                    f"quantize it with --untie-head"
                )
        self.stored = stored
        self.kept = list(stored.modules_to_not_convert)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has the fields

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RcpQuantizationConfig:
        """Read ``quantization_config``.

        Raises:
            ValueError: as :meth:`rcp_kernels.checkpoint.QuantizationConfig.from_dict` and :meth:`__init__`.
        """
        return cls(StoredConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.kept = hf_to_vllm_mapper.apply_list(self.kept)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of a layer, a new object for each; None for other modules than linear layers.

        Raises:
            ValueError: one part of a merged layer is packed and another is not, or the output head is packed.
        """
        parent, _, name = prefix.rpartition(".")
        if not isinstance(layer, LinearBase):
            if name == "lm_head" and prefix not in self.kept:
                raise ValueError(
                    f"RcpQuantizationConfig: {prefix} must be among modules_to_not_convert for vLLM, got {self.kept}; "
                    f"quantize the model without its output head"
                )
            return None
        parts = self.packed_modules_mapping.get(name, [name])
        names = [f"{parent}.{part}" if parent else part for part in parts]
        kept = [part in self.kept for part in names]
        if any(kept) != all(kept):
            raise ValueError(
                f"RcpQuantizationConfig: all of {names} must be packed or none, as vLLM merges them into {prefix}, got "
                f"{[part for part, is_kept in zip(names, kept, strict=True) if is_kept]} in floating point; quantize "
                f"the model with the others there too"
            )
        return UnquantizedLinearMethod() if all(kept) else RcpLinearMethod(self.stored, prefix)


class RcpLinearMethod(LinearMethodBase):
    """The packed weights of one of vLLM's linear layers, on one rank.

    While vLLM loads, the layer has the canonical tensors of docs/format.md as parameters. Those of a merged layer are
    stacked. :meth:`process_weights_after_loading` then packs them once, into ``layer.rcp``.
    """

    def __init__(self, stored: StoredConfig, prefix: str) -> None:
        """The method of the layer that vLLM calls ``prefix``."""
        self.stored = stored
        self.prefix = prefix
        self.rows: list[int] = []
        self.in_features = self.full_in_features = 0
        self.loaded: dict[str, set[int]] = {}
        self.headers: dict[tuple[str, int], Tensor] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters for the checkpoint's tensors.

        Raises:
            ValueError: a rank's part of the input does not end at the end of a group, or of a block of R4.
        """
        stored = self.stored
        features, group = input_size_per_partition, stored.group_size
        self.rows, self.in_features, self.full_in_features = list(output_partition_sizes), features, input_size
        check_group_size(group, input_size)
        self._check_cut("group_size", group)
        rotation = stored.rotation if self.prefix.rpartition(".")[2] == _ROTATED else None
        if rotation is not None and rotation.r4:
            self._check_cut("r4_group_size", rotation.r4_group_size or input_size)
        else:
            rotation = None
        load = extra_weight_attrs.pop("weight_loader")
        rows, groups = sum(self.rows), num_groups(features, group)
        weights = {
            "codes": torch.empty((rows, row_bytes(features, stored.bits, group)), dtype=torch.uint8),
            "levels": torch.empty((rows, groups, 2**stored.bits), dtype=torch.int8),
            "scales": torch.empty((rows, groups), dtype=torch.float16),
        }
        for name, tensor in weights.items():
            attributes = {"output_dim": 0, "input_dim": 1, "weight_loader": self._loader(name, load)}
            self._register(layer, name, tensor, {**attributes, **extra_weight_attrs})
        # vLLM needs a parameter for each name. The values are in self.headers, as each part has its own.
        headers = {"tensor_scale": torch.float32, "format": torch.int64}
        if rotation is not None:
            headers["rotation"] = torch.int64
        for name, dtype in headers.items():
            attributes = {"weight_loader": self._loader(name, None), **extra_weight_attrs}
            self._register(layer, name, torch.zeros((), dtype=dtype), attributes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the loaded tensors with the rules of the format, and pack them.

        Raises:
            ValueError: a tensor is missing, belongs to another layer, or breaks a rule of the format.
        """
        for name, shards in self.loaded.items():
            if len(shards) != len(self.rows):
                raise ValueError(
                    f"{self.prefix}: the checkpoint must have {name} of all {len(self.rows)} parts of the layer, got "
                    f"{len(shards)}; copy the files again"
                )
        weights, start = [], 0
        for shard, rows in enumerate(self.rows):
            weights.append(self._shard(layer, shard, slice(start, start + rows)))
            start += rows
        rotation = self._rotation()
        merged = merge_rows(weights)
        linears = [
            QuantLinear.from_packed(weight, None, self.stored.act_bits, self.stored.act_clip, rotation)
            for weight in (weights if merged is None else [merged])
        ]
        for name in self.loaded:
            delattr(layer, name)
        layer.rcp = nn.ModuleList(linears)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K of this rank] -> [..., N of this rank], in the dtype of x."""
        linears: list[QuantLinear] = list(layer.rcp)  # type: ignore[arg-type]
        rotation = linears[0].input_rotation
        if rotation is not None:
            x = rotation(x)
        outputs, start = [], 0
        for linear in linears:
            # The QuantLinear has no bias: vLLM leaves it out on all ranks but one, or adds it elsewhere.
            stop = start + linear.out_features
            part = None if bias is None else bias[start:stop]
            outputs.append(lut_linear(x, linear.packed, part, linear.geometry, linear.act_bits, linear.act_clip))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _check_cut(self, name: str, group: int) -> None:
        if self.in_features != self.full_in_features and self.in_features % group:
            raise ValueError(
                f"{self.prefix}: {name} must divide the {self.in_features} inputs of a rank, got {group}: the "
                f"{self.full_in_features} inputs would be cut inside a group; use another tensor_parallel_size"
            )

    def _register(self, layer: nn.Module, name: str, tensor: Tensor, attributes: dict[str, Any]) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        set_weight_attrs(parameter, attributes)
        layer.register_parameter(name, parameter)
        self.loaded[name] = set()

    def _loader(self, name: str, load: Callable[..., None] | None) -> Callable[..., None]:
        """The function that vLLM calls with a tensor of the checkpoint: checks, then vLLM's loader, or a copy without
        it.

        vLLM's loaders cut out a rank's part of the tensor. They would convert any dtype into any other.
        """

        def checked(parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
            if tensor.dtype != parameter.dtype:
                raise ValueError(
                    f"{self.prefix}: {name} must be {parameter.dtype}, got {tensor.dtype}; store it unconverted"
                )
            if shard is None and len(self.rows) > 1:
                raise ValueError(
                    f"{self.prefix}: {name} must come in {len(self.rows)} parts, got one tensor of all; the "
                    f"checkpoint is of another model class"
                )
            index = _SHARDS[shard] if isinstance(shard, str) else shard or 0
            if load is None:
                self.headers[name, index] = tensor.detach().cpu().clone()
            else:
                if name == "levels" and not self.loaded[name] and tensor.shape[2:] == (1,):
                    # Groups of kind "uniform" have one level, which only the file shows.
                    parameter.data = parameter.data[:, :, :1].contiguous()
                if name == "levels" and tensor.shape[2:] != parameter.shape[2:]:
                    raise ValueError(
                        f"{self.prefix}: levels must be {list(parameter.shape[2:])} a group in all parts of the layer, "
                        f"as vLLM merges them, got {list(tensor.shape[2:])}; store all parts with tables (as_table), "
                        f"or none"
                    )
                load(parameter, tensor, *([] if shard is None else [shard]))
            self.loaded[name].add(index)

        return checked

    def _shard(self, layer: Any, shard: int, rows: slice) -> PackedWeight:
        """This rank's tensors of one part of the layer, in the format of a checkpoint."""
        header = self.headers["format", shard].clone()
        count = rows.stop - rows.start
        if header.dim() == 1 and header.numel() >= 5 and 1 <= header[0] <= FORMAT_VERSION:
            bits, group_size, in_features, out_features = header[1:5].tolist()
            found = (bits, group_size, in_features)
            rule = (self.stored.bits, self.stored.group_size, self.full_in_features)
            # If there are fewer key and value heads than ranks, vLLM repeats them.
            if found != rule or out_features % count or out_features > count * layer.tp_size:
                raise ValueError(
                    f"{self.prefix}: bits, group_size and in_features of the stored weight must be {rule}, and "
                    f"out_features {count} times at most {layer.tp_size}, got {found} and {out_features}; copy "
                    f"config.json and the weights again"
                )
            if header[0] >= INPUT_ORDER_VERSION:
                raise ValueError(
                    f"{self.prefix}: format must be of a version below {INPUT_ORDER_VERSION}, got {int(header[0])}: "
                    f"the stored weight has an input_order, which the plugin does not apply; quantize the model "
                    f"without act-order"
                )
            header[3], header[4] = self.in_features, count
        try:
            return PackedWeight.from_state_dict(
                {
                    "codes": layer.codes.data[rows],
                    "levels": layer.levels.data[rows],
                    "scales": layer.scales.data[rows],
                    "tensor_scale": self.headers["tensor_scale", shard].to(layer.codes.device),
                    "format": header,
                }
            )
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None

    def _rotation(self) -> OnlineRotation | None:
        """R4 of this rank's inputs. create_weights has checked that no block is cut."""
        if "rotation" not in self.loaded:
            return None
        full = OnlineRotation.from_state(self.headers["rotation", 0])
        if full.size != self.full_in_features or full.heads is not None:
            raise ValueError(
                f"{self.prefix}: rotation must be of the {self.full_in_features} inputs of the layer, got {full}; copy "
                f"config.json and the weights again"
            )
        self._check_cut("the rotation's group_size", full.group_size)
        return OnlineRotation(self.in_features, full.group_size, full.order)


def register() -> None:
    """Register ``quant_method: "rcp"`` with vLLM, which may call this several times in each of its processes."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(RcpQuantizationConfig)
