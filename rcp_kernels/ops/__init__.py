"""The operators: typed functions over ``torch.ops.rcp_kernels``, one file an op, with fake kernel and reference.

Importing this package loads ``rcp_kernels._C``, the compiled library that registers the operators. If torch is a CUDA
build and ``rcp_kernels._C_cuda`` is installed, it also loads that library, the kernels for NVIDIA GPUs.
"""

from importlib import import_module
from pathlib import Path

import torch  # noqa: F401  (the library links against libtorch, which must be loaded first)

try:
    import_module("rcp_kernels._C")
except ImportError as error:
    raise ImportError(
        f"rcp_kernels needs its compiled library rcp_kernels._C, which could not be loaded from "
        f"{Path(__file__).parents[1]}: {error}. Build it with `make build` in a source checkout, or install the "
        f"package with `pip install .` (it needs torch>=2.10 and a C++17 compiler; --no-build-isolation builds against "
        f"the installed torch)."
    ) from error

from ..formats import Geometry
from . import cuda_library, reference
from .clip_search import clip_search
from .decode_attention import decode_attention
from .gptq_round import gptq_round
from .kmeans_levels import kmeans_levels
from .kv_cache import (
    KVStorage,
    empty_kv_cache,
    fake_quantize_kv,
    kv_cache_append,
    kv_cache_attention,
    kv_cache_dequantize,
)
from .lut_linear import Rotation, lut_linear
from .lut_linear_fused import lut_linear_fused
from .nearest_codes import nearest_codes
from .pack_weight import dequantize, pack_weight, unpack_weight
from .quantize_activation import quantize_activation
from .walsh_transform import walsh_quantize, walsh_transform

__all__ = [
    "Geometry",
    "KVStorage",
    "Rotation",
    "clip_search",
    "cuda_library",
    "decode_attention",
    "dequantize",
    "empty_kv_cache",
    "fake_quantize_kv",
    "gptq_round",
    "kmeans_levels",
    "kv_cache_append",
    "kv_cache_attention",
    "kv_cache_dequantize",
    "lut_linear",
    "lut_linear_fused",
    "nearest_codes",
    "pack_weight",
    "quantize_activation",
    "reference",
    "unpack_weight",
    "walsh_quantize",
    "walsh_transform",
]
