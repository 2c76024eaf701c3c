"""Language models from GGUF files, in one pass over the file.

transformers reads a GGUF file three times. Each time ``gguf.GGUFReader`` makes an array of every token of the
vocabulary. transformers also builds gguf's table of tensor names again for every module of the model. This module
parses the header once, with ``struct``, and builds the table once. transformers still defines the model: ``AutoConfig``
reads the config from a copy of the header without the vocabulary, and transformers' own reader makes the tokenizer.
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["gguf_config", "load_gguf"]

# The model_type of transformers by the general.architecture of a file.
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# Architectures whose rows of q and k are in the order of llama.cpp's own RoPE: pairs (0, 1), (2, 3), ... of a head.
_PERMUTED = ("llama",)
# Architectures whose norms differ: llama.cpp stores the factor, transformers the factor minus one.
_OFFSET_NORMS = ("gemma2", "gemma3")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class _Stored:
    """A tensor's shape in torch's order, its type as in ``gguf.GGMLQuantizationType``, and its offset into the data."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class _Header:
    """The metadata of a GGUF file.

    Attributes:
        values: the values of scalar and string fields, and the lengths of arrays, by name.
        fields: the bytes of each field (name and value) by name, without the arrays of the tokenizer.
        tensors: by name.
        alignment: bytes; offsets of tensors are multiples of it.
        data_start: the byte of the file at which the tensors' data begin.
    """

    values: dict[str, Any]
    fields: dict[str, bytes]
    tensors: dict[str, _Stored]
    alignment: int
    data_start: int


def load_gguf(path: Path) -> tuple[nn.Module, Any]:
    """A language model in float32, in eval mode, and its tokenizer.

    Weights, config and tokenizer equal those of transformers' own loader. That loader reads the file if this module
    does not know its architecture, or if the file's tensors are not the model's.

    Args:
        path: a .gguf file.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError, struct.error: the file is damaged, or holds no language model
            that transformers knows.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = _mapped(path)
    # transformers reads a file of another version or byte order, or names its fault.
    if data[:4] == _MAGIC and struct.unpack_from("<I", data, 4)[0] in _VERSIONS:
        header = _read_header(data)
        config = _config(header, path)
        if config is not None:
            model = _model(header, data, config)
            if model is not None:
                return model, _tokenizer(header, path, config.model_type)
    where = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    return AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where).eval(), tokenizer


def gguf_config(path: Path) -> Any:
    """The config of transformers of a GGUF file, without a look at its weights.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError, struct.error: as :func:`load_gguf`.
    """
    from transformers import AutoConfig

    data = _mapped(path)
    config = None
    if data[:4] == _MAGIC and struct.unpack_from("<I", data, 4)[0] in _VERSIONS:
        config = _config(_read_header(data), path)
    if config is None:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    return config


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_header(view: memoryview) -> _Header:
    """Parse a little-endian file of version 2 or 3."""

    def string(at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", view, at)
        end = at + 8 + length
        if end > len(view):
            raise ValueError(f"a name or text at byte {at} is longer than the file")
        return bytes(view[at + 8 : end]).decode(), end

    def skip_strings(at: int, count: int) -> int:
        for _ in range(count):
            at += 8 + struct.unpack_from("<Q", view, at)[0]
        return at

    def value(kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return string(at)
        if kind == _ARRAY:
            inner, count = struct.unpack_from("<IQ", view, at)
            at += 12
            if inner == _STRING:
                return count, skip_strings(at, count)
            return count, at + count * struct.calcsize(_SCALARS[inner])
        return struct.unpack_from(_SCALARS[kind], view, at)[0], at + struct.calcsize(_SCALARS[kind])

    _, _, tensor_count, field_count = struct.unpack_from("<4sIQQ", view, 0)
    at = 24
    values: dict[str, Any] = {}
    fields: dict[str, bytes] = {}
    for _ in range(field_count):
        begin = at
        name, at = string(at)
        (kind,) = struct.unpack_from("<I", view, at)
        values[name], at = value(kind, at + 4)
        if kind != _ARRAY or not name.startswith("tokenizer."):
            fields[name] = bytes(view[begin:at])
    tensors: dict[str, _Stored] = {}
    for _ in range(tensor_count):
        name, at = string(at)
        (dimensions,) = struct.unpack_from("<I", view, at)
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", view, at + 4)
        at += 4 + 8 * dimensions + 12
        # GGUF names the fastest dimension first.
        tensors[name] = _Stored(tuple(reversed(shape)), kind, offset)
    alignment = values.get("general.alignment", 32)
    if alignment < 1:
        raise ValueError(f"general.alignment must be at least 1, got {alignment}")
    return _Header(values, fields, tensors, alignment, -(-at // alignment) * alignment)


def _config(header: _Header, path: Path) -> Any:
    """The config that transformers makes of the file; None for an architecture that `_MODEL_TYPES` does not have.

    transformers parses a copy of the header without the vocabulary. The vocabulary is almost all of a header.
    """
    from transformers import AutoConfig

    architecture = header.values.get("general.architecture")
    if architecture not in _MODEL_TYPES:
        return None
    # transformers takes the head for tied if the header has no such tensor.
    head = b"output.weight" if "output.weight" in header.tensors else None
    copy = struct.pack("<4sIQQ", _MAGIC, 3, int(head is not None), len(header.fields)) + b"".join(
        header.fields.values()
    )
    if head is not None:
        copy += struct.pack(f"<Q{len(head)}sIQIQ", len(head), head, 1, 1, 0, 0)
        copy += bytes(-len(copy) % header.alignment + 4)
    extra: dict[str, Any] = {}
    if f"{architecture}.vocab_size" not in header.values and "tokenizer.ggml.tokens" in header.values:
        extra["vocab_size"] = header.values["tokenizer.ggml.tokens"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "header.gguf").write_bytes(copy)
        config = AutoConfig.from_pretrained(folder, gguf_file="header.gguf", local_files_only=True, **extra)
    config.name_or_path = str(path.parent)
    config.dtype = torch.float32
    return config if config.model_type == _MODEL_TYPES[architecture] else None


def _model(header: _Header, data: memoryview, config: Any) -> Any:
    """The model with its weights; None if the file's tensors are not the model's."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    architecture = header.values["general.architecture"]
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config)
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    stored: dict[str, str] = {}
    for name in model.state_dict():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            stem, _, suffix = name.rpartition(".")
            stored[f"{names.get_name(stem)}.{suffix}"] = name
    if stored.keys() != header.tensors.keys():
        return None
    state: dict[str, Tensor] = {}
    for name, target in stored.items():
        values = _dequantized(name, header, data)
        if architecture in _PERMUTED and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if architecture in _OFFSET_NORMS and "norm.weight" in name:
            values = values - 1
        # A tensor that is stored as float32 is a read-only view of the file.
        state[target] = torch.from_numpy(values if values.flags.writeable else values.copy())
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _dequantized(name: str, header: _Header, data: memoryview) -> np.ndarray:
    """A tensor of the file as float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    stored = header.tensors[name]
    kind = GGMLQuantizationType(stored.type)
    block, size = GGML_QUANT_SIZES[kind]
    row = stored.shape[-1] // block * size
    count = math.prod(stored.shape[:-1]) * row
    begin = header.data_start + stored.offset
    if stored.shape[-1] % block or begin + count > len(data):
        raise ValueError(
            f"{name} of shape {stored.shape} and type {kind.name} at byte {begin} does not lie in the file of "
            f"{len(data)} bytes"
        )
    raw = np.frombuffer(data, np.uint8, count, begin).reshape(*stored.shape[:-1], row)
    return dequantize(raw, kind)


def _tokenizer(header: _Header, path: Path, model_type: str) -> Any:
    """The tokenizer that AutoTokenizer makes of the file, without its extra pass over the file to find the class."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    if (path.parent / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(path.parent, **where)
    if model_type != "llama":
        return AutoTokenizer.from_pretrained(path.parent, tokenizer_type=model_type, **where)
    # AutoTokenizer of transformers 5.0 takes every such file for one of Code Llama and adds special tokens.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, **where)
    # transformers 5.0 uses the token of the beginning of a text for its end too.
    for attribute, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.values.get(f"tokenizer.ggml.{field}_token_id")
        if index is not None and index != getattr(tokenizer, f"{attribute}_token_id"):
            setattr(tokenizer, f"{attribute}_token", tokenizer.convert_ids_to_tokens(index))
    return tokenizer
