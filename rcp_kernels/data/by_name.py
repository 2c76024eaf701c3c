"""Text by the names that the command line takes."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..models.load import encode
from ..nn.model_digest import model_digest
from . import corpus
from .generated import cached_texts, chat_prompts, generate_texts, opening_prompts
from .reasoning import reasoning_questions

__all__ = ["held_out_text", "training_text"]

_CHARACTERS_PER_TOKEN = 8  # of English about four; twice as many leave no doubt
_BATCH = 128  # prompts that are continued at a time
# Percent of the tokens. The model's own text costs a third of the CPU time of the updates that it is used in.
_SHARES = {
    "mixed": {"docstrings": 40, "comments": 40, "generated": 20},
    "generated": {"generated": 100},
    "reasoning": {"reasoning": 100},
}


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
    return corpus.held_out_default(), "pydoc_data.topics"
