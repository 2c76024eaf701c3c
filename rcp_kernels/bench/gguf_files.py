"""GGUF files for llama.cpp in the kinds Q4_0, Q2_K and Q3_K_M: a float model's weights, or random ones.

The kinds of the tensors follow llama.cpp's own rules (llama_tensor_get_type in llama-quant.cpp), without an importance
matrix. Q2_K, Q3_K, ... have blocks of 256 weights. A row that they do not divide gets the kind that llama.cpp takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import extras
from .llama_cpp import Library

__all__ = ["KINDS", "random_llama", "requantize"]

KINDS = ("Q4_0", "Q2_K", "Q3_K_M")

_RANDOM_ROWS = 64  # of a weight; they repeat, because ggml's search for Q2_K is slow

_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def _kind_of(name: str, kind: str, layers: int, tied: bool, gqa: int) -> str:
    """The kind of one 2-D tensor in a file of a kind, before the fallback."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    if kind == "Q4_0":
        return "Q4_0"
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if kind == "Q2_K":
        if "attn_v" in name:
            return "Q4_K" if gqa >= 4 else "Q3_K"
        return "Q3_K" if "ffn_down" in name or "attn_output" in name else "Q2_K"
    if "attn_v" in name:
        return "Q5_K" if layer < 2 else "Q4_K"
    if "ffn_down" in name:
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    return "Q4_K" if "attn_output" in name else "Q3_K"


def requantize(
    library: Library,
    source: Path,
    out: Path,
    kind: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the weights of a GGUF file in another kind.

    Args:
        library: quantizes the blocks.
        source: a GGUF file. Its weights are dequantized first.
        out: the file to write.
        kind: one of KINDS.
        progress: called with the tensors done and their number.

    Raises:
        MissingExtra: gguf is not installed.
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"bench: the kind of a GGUF file must be one of {', '.join(KINDS)}, got {kind!r}")
    extras.require("gguf")
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    _copy_fields(reader, writer)

    def number(key: str) -> int:
        return int(reader.fields[f"{architecture}.{key}"].contents())

    gqa = number("attention.head_count") // number("attention.head_count_kv")
    layers = number("block_count")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    for done, tensor in enumerate(reader.tensors):
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if values.dim() < 2:
            writer.add_tensor(tensor.name, values.float().numpy())
        else:
            _add(writer, library, tensor.name, values, _kind_of(tensor.name, kind, layers, tied, gqa))
        progress(done + 1, len(reader.tensors))
    _finish(writer)


def random_llama(library: Library, out: Path, shape: Mapping[str, int], kind: str) -> None:
    """Write a LLaMA with random weights and without a tokenizer: the speed does not depend on the values.

    Args:
        library: quantizes the blocks.
        out: the file to write.
        shape: fields of transformers' LlamaConfig. The defaults are the sizes of LLaMA-2-7B.
        kind: one of KINDS.

    Raises:
        MissingExtra: gguf or transformers is not installed.
    """
    extras.require("gguf", "transformers")
    import gguf
    from transformers import LlamaConfig

    config = LlamaConfig.from_dict(dict(shape))
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    gqa = config.num_attention_heads // kv_heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    shapes = {
        "token_embd": (config.vocab_size, hidden),
        "output": (config.vocab_size, hidden),
        "output_norm": (hidden,),
    }
    per_layer = {
        "attn_norm": (hidden,), "ffn_norm": (hidden,),
        "attn_q": (hidden, hidden), "attn_k": (hidden // gqa, hidden), "attn_v": (hidden // gqa, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": size for name, size in per_layer.items()}
    for stem, size in shapes.items():
        name = f"{stem}.weight"
        if len(size) == 1:
            writer.add_tensor(name, torch.ones(size).numpy())
            continue
        values = torch.randn(min(size[0], _RANDOM_ROWS), size[1]) * size[1] ** -0.5
        _add(writer, library, name, values, _kind_of(name, kind, layers, False, gqa), repeat_to=size[0])
    _finish(writer)


def _add(
    writer: Any, library: Library, name: str, values: torch.Tensor, kind: str, repeat_to: int | None = None
) -> None:
    """Add weights, float32 [rows, columns], in a kind of ggml or its fallback. The rows may repeat to a number."""
    import gguf
    import numpy

    if values.shape[1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]:
        kind = _FALLBACK[kind]
    type_id = gguf.GGMLQuantizationType[kind]
    data = numpy.frombuffer(library.quantize(values, int(type_id)), dtype=numpy.uint8).reshape(values.shape[0], -1)
    if repeat_to is not None:
        data = numpy.resize(data, (repeat_to, data.shape[1]))
    writer.add_tensor(name, data, raw_dtype=type_id)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_fields(reader: Any, writer: Any) -> None:
    """Every key and value but those that the writer sets itself."""
    import gguf

    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
