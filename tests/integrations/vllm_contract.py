"""Copies of the classes of vLLM that rcp_kernels.integrations.vllm uses, for machines without vLLM.

They follow vLLM 0.33.0, as far as a linear layer needs it: names, arguments, attributes that a loader reads, and the
order of the calls. The originals are in these files:

- vllm/model_executor/layers/linear.py: the base classes; ``weight_loader`` of each parallel layer, the one that is used
  for a linear method not listed in WEIGHT_LOADER_V2_SUPPORTED; ``forward``.
- vllm/model_executor/layers/quantization/__init__.py: register_quantization_config, get_quantization_config.
- vllm/model_executor/layers/quantization/base_config.py: QuantizationConfig, QuantizeMethodBase.
- vllm/model_executor/utils.py: set_weight_attrs.

Left out: the loaders' special cases for packed dims, marlin, block scales and GGUF, gather_output, disable_tp.
"""

import contextlib
import importlib.machinery
import sys
import types
from abc import ABC, abstractmethod

import torch
from torch import nn

VERSION = "0.33.0"


def get_tensor_model_parallel_rank():
    return 0


def get_tensor_model_parallel_world_size():
    return 1


def tensor_model_parallel_all_reduce(x):
    return x


def _rank():
    return sys.modules[__name__].get_tensor_model_parallel_rank()


def _world():
    return sys.modules[__name__].get_tensor_model_parallel_world_size()


def _divide(size, parts):
    assert size % parts == 0
    return size // parts


def set_weight_attrs(weight, weight_attrs):
    for key, value in (weight_attrs or {}).items():
        assert not hasattr(weight, key), key
        setattr(weight, key, value)


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ):
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        return

    def maybe_update_config(self, model_name, hf_config=None, revision=None):
        return


QUANTIZATION_METHODS = ["fp8", "gptq"]
_CUSTOMIZED = {}


def register_quantization_config(quantization):
    def wrapper(cls):
        if quantization not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.append(quantization)
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        _CUSTOMIZED[quantization] = cls
        return cls

    return wrapper


def get_quantization_config(quantization):
    if quantization not in QUANTIZATION_METHODS:
        raise ValueError(f"Invalid quantization method: {quantization}")
    return _CUSTOMIZED[quantization]


class LinearBase(nn.Module):
    def __init__(self, input_size, output_size, bias, params_dtype, quant_config, prefix, return_bias):
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix, self.return_bias = prefix, return_bias
        self.quant_method = quant_config.get_quant_method(self, prefix) if quant_config else UnquantizedLinearMethod()
        if self.quant_method is None:
            raise ValueError("All linear layers should support quant method.")
        self.tp_rank, self.tp_size = _rank(), _world()

    def _create(self, inputs, outputs, bias, bias_size):
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=outputs,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(bias_size, dtype=self.params_dtype), requires_grad=False)
            set_weight_attrs(self.bias, {"output_dim": 0, "weight_loader": self.weight_loader})

    def _copy(self, target, loaded):
        if loaded.dim() == 0:
            loaded = loaded.reshape(1)
        assert target.shape == loaded.shape
        target.copy_(loaded)


class ColumnParallelLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        gather_output=False,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
        *,
        return_bias=True,
    ):
        outputs = [_divide(size, _world()) for size in getattr(self, "output_sizes", [output_size])]
        super().__init__(input_size, output_size, bias, params_dtype, quant_config, prefix, return_bias)
        self.skip_bias_add = skip_bias_add
        self._create(input_size, outputs, bias, sum(outputs))

    def weight_loader(self, param, loaded_weight):
        if getattr(param, "output_dim", None) is not None:
            size = param.data.shape[param.output_dim]
            loaded_weight = loaded_weight.narrow(param.output_dim, self.tp_rank * size, size)
        self._copy(param.data, loaded_weight)

    def forward(self, x):
        y = self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)
        return (y, self.bias if self.skip_bias_add else None) if self.return_bias else y


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size, output_sizes, bias=True, **kwargs):
        self.output_sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), bias, **kwargs)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        assert loaded_shard_id is not None, "a tensor of all shards is split first, in vLLM"
        start = sum(self.output_sizes[:loaded_shard_id]) // self.tp_size
        size = self.output_sizes[loaded_shard_id] // self.tp_size
        target = param.data.narrow(param.output_dim, start, size)
        self._copy(target, loaded_weight.narrow(param.output_dim, self.tp_rank * size, size))


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self, hidden_size, head_size, total_num_heads, total_num_kv_heads=None, bias=True, skip_bias_add=False, **kwargs
    ):
        kv_heads, world = total_num_kv_heads or total_num_heads, _world()
        self.head_size = head_size
        self.num_heads = _divide(total_num_heads, world)
        self.num_kv_heads = 1 if world >= kv_heads else _divide(kv_heads, world)
        self.num_kv_head_replicas = _divide(world, kv_heads) if world >= kv_heads else 1
        self.output_sizes = [
            self.num_heads * head_size * world,
            self.num_kv_heads * head_size * world,
            self.num_kv_heads * head_size * world,
        ]
        super().__init__(hidden_size, sum(self.output_sizes), bias, skip_bias_add=skip_bias_add, **kwargs)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        assert loaded_shard_id in ("q", "k", "v"), "a tensor of all shards is split first, in vLLM"
        index = "qkv".index(loaded_shard_id)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        start, size = sum(heads[:index]) * self.head_size, heads[index] * self.head_size
        rank = self.tp_rank if loaded_shard_id == "q" else self.tp_rank // self.num_kv_head_replicas
        target = param.data.narrow(param.output_dim, start, size)
        self._copy(target, loaded_weight.narrow(param.output_dim, rank * size, size))


class RowParallelLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        params_dtype=None,
        reduce_results=True,
        quant_config=None,
        prefix="",
        *,
        return_bias=True,
    ):
        super().__init__(input_size, output_size, bias, params_dtype, quant_config, prefix, return_bias)
        assert input_is_parallel
        self.skip_bias_add, self.reduce_results = skip_bias_add, reduce_results
        self._create(_divide(input_size, _world()), [output_size], bias, output_size)

    def weight_loader(self, param, loaded_weight):
        if getattr(param, "input_dim", None) is not None:
            size = param.data.shape[param.input_dim]
            loaded_weight = loaded_weight.narrow(param.input_dim, self.tp_rank * size, size)
        self._copy(param.data, loaded_weight)

    def forward(self, x):
        bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
        y = self.quant_method.apply(self, x, bias)
        if self.reduce_results and self.tp_size > 1:
            y = sys.modules[__name__].tensor_model_parallel_all_reduce(y)
        return (y, self.bias if self.skip_bias_add else None) if self.return_bias else y


@contextlib.contextmanager
def installed():
    """Let ``import vllm...`` find this file; not for longer than that needs, as others ask whether vLLM is there."""
    own = sys.modules[__name__]
    names = ("", ".model_executor", ".model_executor.layers", ".model_executor.layers.quantization")
    modules = {f"vllm{name}": types.ModuleType(f"vllm{name}") for name in names}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
    quantization = modules["vllm.model_executor.layers.quantization"]
    quantization.QUANTIZATION_METHODS = QUANTIZATION_METHODS
    quantization.register_quantization_config = register_quantization_config
    quantization.get_quantization_config = get_quantization_config
    for name in ("layers.linear", "layers.quantization.base_config", "utils"):
        modules[f"vllm.model_executor.{name}"] = own
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
