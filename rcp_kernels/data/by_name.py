"""Models and text by the names that the command line takes."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig, load_quantized
from ..models import hf
from ..nn.model_digest import model_digest
from . import corpus
from .generated import cached_texts, chat_prompts, generate_texts, opening_prompts
from .reasoning import reasoning_questions

__all__ = [
    "encode",
    "group_size_of",
    "held_out_text",
    "is_quantized",
    "load_any",
    "load_float",
    "source_bytes",
    "source_dtype",
    "training_text",
]

_NUMBER = re.compile(r"\d+")
_CHARACTERS_PER_TOKEN = 8  # of English about four; twice as many leave no doubt
_BATCH = 128  # prompts that are continued at a time
# Percent of the tokens. The model's own text costs a third of the CPU time of the updates that it is used in.
_SHARES = {
    "mixed": {"docstrings": 40, "comments": 40, "generated": 20},
    "generated": {"generated": 100},
    "reasoning": {"reasoning": 100},
}


def load_float(name: str) -> tuple[nn.Module, Any]:
    """A float32 language model and its tokenizer.

    Args:
        name: "demo", a .gguf file, a transformers directory, or a hub id.

    Raises:
        MissingExtra: a package is missing.
        ValueError: the model is quantized, by whatever method, or its files are damaged or have other weights than
            its config.json asks for.
        OSError: no such model.
    """
    from ..demo import run as demo

    if name == "demo":
        return demo.load_model(demo.find_model_file())
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: {path} must be a .gguf file, got no such file; check the path")
        return demo.load_model(path)
    # A hub id is NAME or OWNER/NAME; transformers would look for a mistyped path there.
    if not path.is_dir() and (path.is_absolute() or name[:1] in (".", "~") or name.count("/") > 1):
        raise FileNotFoundError(f"model: {name} must be a model's directory, got no such directory; check the path")
    extras.require("transformers", "safetensors")
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = path.is_dir()
    quantization = getattr(AutoConfig.from_pretrained(name, local_files_only=local), "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(
            f"model: {name} must be a float model, got a quantized one (quant_method {method!r}); pass the one it was "
            f"made of"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    try:
        # Sizes that do not fit are refused below, by name.
        with hf.without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=local,
            )
    except SafetensorError as error:
        raise ValueError(
            f"model: the weights of {name} must be whole safetensors files, got {error}; copy the model again"
        ) from None
    model, report = loaded
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    # More layers than config.json has; other parts, such as an image encoder, may stay unused.
    patterns = {_NUMBER.sub("0", key) for key in model.state_dict()}
    unused = sorted(key for key in report["unexpected_keys"] if _NUMBER.sub("0", key) in patterns)
    for found, rule in (
        (sorted(report["missing_keys"]), "have every weight that config.json asks for"),
        (unused, "have no layer that config.json does not ask for"),
        (mismatched, "have weights of the sizes in config.json"),
    ):
        if found:
            raise ValueError(
                f"model: the files of {name} must {rule}, got {len(found)} that break this, {found[:3]}; copy the "
                f"model and its config.json again"
            )
    return model.eval(), tokenizer


def source_dtype(name: str) -> torch.dtype:
    """The dtype that a float model is stored in, as :func:`load_float` takes it by name; bfloat16 for a .gguf file.

    A .gguf file stores most weights in few bits and no dtype to speak of. The models in such files were published in
    bfloat16.
    """
    if name == "demo" or Path(name).suffix == ".gguf":
        return torch.bfloat16
    from transformers import AutoConfig

    local = Path(name).is_dir()
    dtype = AutoConfig.from_pretrained(name, local_files_only=local).dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if not isinstance(dtype, torch.dtype):
        # An old config.json. As transformers does: the dtype of the first floating point tensor.
        dtype = next(_stored_dtypes(Path(name)), torch.float32)
    return dtype


def _stored_dtypes(folder: Path) -> Iterator[torch.dtype]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                dtype = file.get_tensor(key).dtype
                if dtype.is_floating_point:
                    yield dtype


def source_bytes(name: str) -> int | None:
    """Bytes of the weight files of a model by name; None for a hub id."""
    from ..demo import run as demo

    path = demo.find_model_file() if name == "demo" else Path(name)
    if path.is_file():
        return path.stat().st_size
    sizes = [file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern)]
    return sum(sizes) or None


def is_quantized(name: str) -> bool:
    """Whether this is a directory that ``rcp-kernels quantize`` wrote."""
    config = Path(name) / "config.json"
    try:
        fields = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    quantization = fields.get("quantization_config") if isinstance(fields, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def load_any(name: str) -> tuple[nn.Module, Any, QuantizationConfig | None]:
    """A quantized or float model, its tokenizer, and its quantization or None."""
    if not is_quantized(name):
        return (*load_float(name), None)
    extras.require("transformers")
    from transformers import AutoTokenizer

    # In float32, as a float model is loaded: what is measured is the quantization, not bfloat16's rounding.
    model, config = load_quantized(name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name), config


def group_size_of(model: nn.Module, asked: int | None) -> int:
    """The group size asked for, or else the largest of 128, 64 and 32 that divides every linear layer's input."""
    if asked is not None:
        return asked
    sizes = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    return next((size for size in (128, 64, 32) if not any(features % size for features in sizes)), 128)


def encode(tokenizer: Any, text: str) -> Tensor:
    """int64 [tokens], without special tokens."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    return ids[0]


def training_text(
    name: str | None,
    tokens: int,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> tuple[str, dict[str, Any]]:
    """Text to calibrate or train on, and what a report should say of it.

    Args:
        name: a UTF-8 file, "dataset:NAME", "generated", "mixed", "reasoning", or None for docstrings of what is
            installed.
        tokens: that will be used of it at most; a dataset is read no further, and no more is generated.
        model, tokenizer: that "generated", "mixed" and "reasoning" are written by.
        seed: of what is written.
        progress: called with a phase, what is done, what there is, and a text, while it is written.
    """
    if name is None:
        text = corpus.docstring_corpus()
        return text.text, {"text": f"docstrings of {', '.join(corpus.PACKAGES)}", **_facts(text)}
    if name in _SHARES:
        if model is None:
            raise ValueError(f"text: {name} needs a model that writes it, got none; pass a file or a dataset")
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":  # each would write its own, and float sums of two machines differ
            raise ValueError(f"text: {name} must be written by one process, got {processes}; pass a file or a dataset")
        return _written_text(name, tokens, model, tokenizer, seed, progress)
    if name.startswith("dataset:"):
        text_ = corpus.dataset_text(name.partition(":")[2], "train", tokens * _CHARACTERS_PER_TOKEN)
    else:
        text_ = corpus.file_text(Path(name))
    return text_, {"text": name, "characters": len(text_)}


def _facts(text: corpus.Corpus) -> dict[str, Any]:
    return {"documents": len(text.documents), "dropped_paragraphs": text.dropped, "sha256": text.sha256}


def _written_text(
    name: str,
    tokens: int,
    model: nn.Module,
    tokenizer: Any,
    seed: int,
    progress: Callable[[str, int, int, str], None],
) -> tuple[str, dict[str, Any]]:
    """Documents of the kinds of `_SHARES`, or all of them by the model."""
    shares = {kind: -(-tokens * percent // 100) for kind, percent in _SHARES[name].items()}
    openings = functools.cache(corpus.docstring_corpus)
    kinds: dict[str, Callable[[], corpus.Corpus]] = {
        "docstrings": openings,
        "comments": corpus.comment_corpus,
        "generated": lambda: corpus.without_overlap(
            _generated(openings(), shares["generated"], model, tokenizer, seed, progress)
        ),
        "reasoning": lambda: corpus.without_overlap(
            _reasoning(shares["reasoning"], model, tokenizer, seed, progress), keep_repeated=True
        ),
    }
    documents: list[str] = []
    facts: dict[str, Any] = {"text": name}
    for kind, share in shares.items():
        text = kinds[kind]()
        # In order: those of Python's own library come first.
        taken: list[str] = []
        count = 0
        for document in text.documents:
            if count >= share:
                break
            taken.append(document)
            count += encode(tokenizer, document).numel() + 1
        documents += taken
        facts[kind] = {**_facts(corpus.Corpus(tuple(taken), text.dropped)), "tokens": count}
    return "\n\n".join(documents), facts


def _generated(
    openings: corpus.Corpus,
    tokens: int,
    model: nn.Module,
    tokenizer: Any,
    seed: int,
    progress: Callable[[str, int, int, str], None],
) -> list[str]:
    """About as many tokens as asked for, half of them answers to questions if the model has a chat template."""
    # SmolLM2's texts have 230 tokens with their prompts; what is too much makes up for paragraphs that are dropped.
    count = -(-tokens // 150)
    questions: list[str] = []
    if tokenizer.chat_template:
        questions = corpus.python_questions()
        chosen = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))[: count // 2]
        questions = chat_prompts(tokenizer, [questions[i] for i in chosen.tolist()])
    prompts = opening_prompts(tokenizer, openings.documents, count - len(questions), 16, seed)
    return _continued([*prompts, *questions], 224, model, tokenizer, seed, progress)


def _reasoning(
    tokens: int, model: nn.Module, tokenizer: Any, seed: int, progress: Callable[[str, int, int, str], None]
) -> list[str]:
    """About as many tokens as asked for of answers to questions that ask for every step."""
    # An answer may have 384 tokens; counted at half of that, most texts being too long and not too short.
    questions = chat_prompts(tokenizer, reasoning_questions(-(-tokens // 200), seed))
    return _continued(questions, 384, model, tokenizer, seed, progress)


def _continued(
    prompts: Sequence[str | Tensor],
    max_new_tokens: int,
    model: nn.Module,
    tokenizer: Any,
    seed: int,
    progress: Callable[[str, int, int, str], None],
) -> list[str]:
    """Prompts and what the model writes after them, in random order; kept for the next run."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.7, "top_p": 1.0, "seed": seed}
    workers = 2 if next(model.parameters()).device.type == "cpu" else 1
    asked = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    conditions = {
        **settings,
        "model": model_digest(model),
        "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "special": sorted(tokenizer.all_special_ids),
        "batch_size": _BATCH,
        "workers": workers,
        "threads": 1 if workers > 1 else torch.get_num_threads(),
        "versions": [__version__, torch.__version__, importlib.metadata.version("transformers")],
    }

    def write() -> list[str]:
        texts = generate_texts(
            copy.deepcopy(model).to(torch.bfloat16),
            tokenizer,
            prompts,
            batch_size=_BATCH,
            workers=workers,
            progress=lambda done, total, text: progress("writing text", done, total, text),
            **settings,
        )
        return [tokenizer.decode(text) for text in texts]

    # Prompts come kind by kind: what is taken of them has to be of all kinds.
    written = cached_texts(
        Path(os.environ.get("RCP_CACHE_DIR", "~/.cache/rcp_kernels")).expanduser() / "text", conditions, write
    )
    order = torch.randperm(len(written), generator=torch.Generator().manual_seed(seed))
    return [written[i] for i in order.tolist()]


def held_out_text(text: Path | None, dataset: str | None, tokens: int) -> tuple[str, str]:
    """Text to measure perplexity on, and its name: a file, a dataset's test split, or pydoc's topics without either."""
    if text is not None:
        return corpus.file_text(text), str(text)
    if dataset is not None:
        return corpus.dataset_text(dataset, "test", tokens * _CHARACTERS_PER_TOKEN), dataset
    from ..demo.run import topics_text

    return topics_text(), "pydoc_data.topics"
