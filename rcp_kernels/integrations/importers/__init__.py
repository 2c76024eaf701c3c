"""Checkpoints of other libraries as :class:`rcp_kernels.PackedWeight`, a file each (docs/integrations/import.md)."""

from ...formats import ImportedWeight
from .awq import import_awq
from .compressed_tensors import import_compressed_tensors, import_compressed_tensors_mxfp4
from .gguf import import_gguf, undo_llama_permutation
from .gptq import import_gptq
from .lut import import_any_precision, import_lut, import_squeezellm

__all__ = [
    "ImportedWeight",
    "import_any_precision",
    "import_awq",
    "import_compressed_tensors",
    "import_compressed_tensors_mxfp4",
    "import_gguf",
    "import_gptq",
    "import_lut",
    "import_squeezellm",
    "undo_llama_permutation",
]
