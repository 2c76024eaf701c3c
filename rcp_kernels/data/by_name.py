"""Text by the names that the command line takes."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, extras
from ..hardware import fast_bfloat16
from ..models.load import encode
from ..nn.model_digest import model_digest
from . import corpus
from .generated import cached_texts, chat_prompts, generate_texts, opening_prompts
from .reasoning import reasoning_questions

__all__ = ["TEXTS", "Progress", "check_text", "held_out_text", "training_text"]

Progress = Callable[[str, int, int, str], None]
"""Called with a phase, the units done, their total, and a text. The total is 0 for a text that stands alone."""

# English has about four characters a token. Twice as many are enough for any tokenizer.
_CHARACTERS_PER_TOKEN = 8
# Prompts that the model continues at a time.
_BATCH = 128
# Percent of the tokens. Writing a text takes a third of the CPU time of the updates that use it.
_SHARES = {
    "mixed": {"docstrings": 40, "comments": 40, "generated": 20},
    "generated": {"generated": 100},
    "reasoning": {"reasoning": 100},
}
TEXTS = tuple(_SHARES)
"""Names of texts that the model writes, in whole or in part."""


def check_text(name: str | None) -> None:
    """Refuse before a model is loaded the names that :func:`training_text` would refuse after it.

    Args:
        name: as :func:`training_text` takes it. A file is read; a dataset is not looked up.

    Raises:
        MissingExtra: the package ``datasets`` is not installed.
        ValueError: the file is not UTF-8 or has no text; or several processes would each write their own text.
        OSError: there is no such file.
    """
    if name in _SHARES:
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":  # float sums of two machines differ, and so would their texts
            raise ValueError(f"text: {name} must be written by one process, got {processes}; pass a file or a dataset")
    elif name is not None and name.startswith("dataset:"):
        extras.require("datasets")
    elif name is not None:
        if not Path(name).exists():
            raise FileNotFoundError(
                f"text: {name} must be a file, dataset:NAME, or one of {tuple(_SHARES)}, got no such file; check the "
                f"path, or leave it out for docstrings"
            )
        corpus.file_text(Path(name))


def training_text(
    name: str | None,
    tokens: int,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[str, dict[str, Any]]:
    """A text to calibrate or train on, and the report's fields about it.

    Args:
        name: a UTF-8 file, "dataset:NAME", "generated", "mixed", "reasoning", or None for docstrings of installed
            packages.
        tokens: at most so many are used. A dataset is read no further, and no more text is generated.
        model: writes "generated", "reasoning" and a part of "mixed".
        tokenizer: of the model.
        seed: of the text that the model writes.
        device: that a copy of the model writes on. None: the device that the model is on.
        progress: called while the model writes.

    Raises:
        ValueError, OSError: as :func:`check_text`; or there is no model for a text that it writes.
    """
    check_text(name)
    if name is None:
        found = corpus.docstring_corpus()
        return found.text, {"text": f"docstrings of {', '.join(corpus.PACKAGES)}", **_facts(found)}
    if name in _SHARES:
        if model is None:
            raise ValueError(f"text: {name} needs a model that writes it, got none; pass a file or a dataset")
        if device is None:
            device = next(model.parameters()).device
        return _written_text(name, tokens, _Writer(model, tokenizer, seed, device, progress))
    if name.startswith("dataset:"):
        text = corpus.dataset_text(name.partition(":")[2], "train", tokens * _CHARACTERS_PER_TOKEN)
    else:
        text = corpus.file_text(Path(name))
    return text, {"text": name, "characters": len(text)}


def _facts(text: corpus.Corpus) -> dict[str, Any]:
    return {"documents": len(text.documents), "dropped_paragraphs": text.dropped, "sha256": text.sha256}


def _written_text(name: str, tokens: int, writer: _Writer) -> tuple[str, dict[str, Any]]:
    """Documents of each kind of ``_SHARES[name]``, in the order of the kinds."""
    shares = {kind: -(-tokens * percent // 100) for kind, percent in _SHARES[name].items()}
    openings = functools.cache(corpus.docstring_corpus)
    kinds: dict[str, Callable[[], corpus.Corpus]] = {
        "docstrings": openings,
        "comments": corpus.comment_corpus,
        "generated": lambda: corpus.without_overlap(_generated(openings(), shares["generated"], writer)),
        "reasoning": lambda: corpus.without_overlap(_reasoning(shares["reasoning"], writer), keep_repeated=True),
    }
    documents: list[str] = []
    facts: dict[str, Any] = {"text": name}
    for kind, share in shares.items():
        text = kinds[kind]()
        # The documents are in order: those of Python's own library come first.
        taken: list[str] = []
        count = 0
        for document in text.documents:
            if count >= share:
                break
            taken.append(document)
            count += encode(writer.tokenizer, document).numel() + 1
        documents += taken
        facts[kind] = {**_facts(corpus.Corpus(tuple(taken), text.dropped)), "tokens": count}
    return "\n\n".join(documents), facts


def _generated(openings: corpus.Corpus, tokens: int, writer: _Writer) -> list[str]:
    """Texts of about as many tokens as asked for. Half are answers to questions if there is a chat template."""
    # SmolLM2 writes 230 tokens a text, prompt included. Counting 150 makes up for paragraphs that are dropped later.
    count = -(-tokens // 150)
    tokenizer, seed = writer.tokenizer, writer.seed
    questions: list[str] = []
    if tokenizer.chat_template:
        questions = corpus.python_questions()
        chosen = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))[: count // 2]
        questions = chat_prompts(tokenizer, [questions[i] for i in chosen.tolist()])
    prompts = opening_prompts(tokenizer, openings.documents, count - len(questions), 16, seed)
    return writer.continued([*prompts, *questions], 224)


def _reasoning(tokens: int, writer: _Writer) -> list[str]:
    """Answers to questions that ask for every step, of about as many tokens as asked for."""
    # An answer has at most 384 tokens. Counting 200 gives too much text rather than too little.
    return writer.continued(chat_prompts(writer.tokenizer, reasoning_questions(-(-tokens // 200), writer.seed)), 384)


@dataclass(frozen=True)
class _Writer:
    """A model that writes text on a device: a copy of it, in bfloat16 where that is fast, else in float32."""

    model: nn.Module
    tokenizer: Any
    seed: int
    device: torch.device
    progress: Progress

    def continued(self, prompts: Sequence[str | Tensor], max_new_tokens: int) -> list[str]:
        """Prompts with the model's continuations, in random order. They are cached for the next run."""
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": 0.7,
            "top_p": 1.0,
            "seed": self.seed,
        }
        workers = 2 if self.device.type == "cpu" else 1
        asked = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in prompts]
        conditions = {
            **settings,
            "model": model_digest(self.model),
            "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "special": sorted(self.tokenizer.all_special_ids),
            "batch_size": _BATCH,
            "workers": workers,
            "threads": 1 if workers > 1 else torch.get_num_threads(),
            "versions": [__version__, torch.__version__, importlib.metadata.version("transformers")],
        }
        if self.device.type != "cpu":  # the text of a CPU stays cached
            conditions["device"] = self.device.type
        dtype = torch.bfloat16 if fast_bfloat16(self.device) else torch.float32
        if dtype == torch.float32:
            conditions["dtype"] = "float32"

        def write() -> list[str]:
            texts = generate_texts(
                copy.deepcopy(self.model).to(dtype).to(self.device),
                self.tokenizer,
                prompts,
                batch_size=_BATCH,
                workers=workers,
                progress=lambda done, total, text: self.progress("writing text", done, total, text),
                **settings,
            )
            return [self.tokenizer.decode(text) for text in texts]

        written = cached_texts(
            Path(os.environ.get("RCP_CACHE_DIR", "~/.cache/rcp_kernels")).expanduser() / "text", conditions, write
        )
        # The prompts come kind by kind, and the caller takes the first texts only.
        order = torch.randperm(len(written), generator=torch.Generator().manual_seed(self.seed))
        return [written[i] for i in order.tolist()]


def held_out_text(text: Path | None, dataset: str | None, tokens: int) -> tuple[str, str]:
    """A text to measure perplexity on, and its name.

    Args:
        text: a UTF-8 file, or None.
        dataset: without a file, a dataset whose test split is read, or None for the topics of pydoc.
        tokens: that will be used of a dataset.
    """
    if text is not None:
        return corpus.file_text(text), str(text)
    if dataset is not None:
        return corpus.dataset_text(dataset, "test", tokens * _CHARACTERS_PER_TOKEN), dataset
    return corpus.held_out_default(), "pydoc_data.topics"
