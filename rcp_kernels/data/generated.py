"""Text that a model writes: sampled continuations of prompts, reproducible by their seed.

BitDistiller (Du et al. 2024, arXiv 2402.10631) trains a student on text that its teacher generated at temperature 0.7.
The teacher's distribution is most informative on such text, and prompts are the only data that it needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.files import atomic_file

__all__ = ["cached_texts", "chat_prompts", "generate_texts", "opening_prompts"]

# Cached texts of another version are written again. 2: transformers' generate writes them.
_VERSION = 2


class _Sampler:
    """A logits processor whose argmax is a sample of the next token.

    The processor subtracts the logarithm of exponential noise, as ``torch.multinomial`` does. ``generate`` itself
    samples with torch's global generator, which threads share. Without a generator this class does as well.
    """

    def __init__(self, temperature: float, top_p: float, generator: torch.Generator | None) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
        if top_p < 1.0:  # TopPLogitsWarper sorts the whole vocabulary
            self._warpers.append(TopPLogitsWarper(top_p))
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores - noise.log_()


@contextlib.contextmanager
def _default_generation(model: Any) -> Iterator[None]:
    """The model without its own generation settings, such as a repetition penalty: they change the distribution."""
    from transformers import GenerationConfig

    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Tensor]:
    """Continue prompts with a model, each until its first special token or ``max_new_tokens``.

    Prompts are padded on the left to the longest one of their batch. The random numbers depend only on the seed and on
    a prompt's place in the batches. The same arguments on the same device give the same tokens. Another number of
    torch's threads changes float sums and, in the end, the text.

    Args:
        model: a causal language model of transformers, in eval mode, on any device. The model computes in its own
            dtype; bfloat16 is fast.
        tokenizer: of the model. Any of its ``all_special_ids`` ends a text.
        prompts: text, which is tokenized without special tokens, or int64 [tokens]. At least one token each.
        max_new_tokens: limit for each text.
        temperature: 0 takes the most probable token.
        top_p: sample from the most probable tokens that together have this probability.
        seed: of the sampling.
        batch_size: prompts in a batch.
        workers: number of threads. Each takes a batch at a time and computes it on one core; 1 leaves threads to torch.
            On a CPU that is busy with other jobs, two cores that share one matrix wait for each other at every
            operator. The text does not depend on the number of workers as long as torch has one thread.
        progress: called with the number of finished texts, their total, and a message.

    Returns:
        int64 [tokens] for each prompt: the prompt, its continuation, and the special token that ended the text.

    Raises:
        ValueError: a prompt without tokens, or an argument out of its range.
    """
    ids = [prompt if isinstance(prompt, Tensor) else _encode(tokenizer, prompt) for prompt in prompts]
    for number, prompt in enumerate(ids):
        if prompt.dim() != 1 or not prompt.numel():
            raise ValueError(
                f"generate_texts: every prompt must have at least one token, got shape {tuple(prompt.shape)} for "
                f"prompt {number}; leave it out"
            )
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0.0 or not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"generate_texts: max_new_tokens and batch_size must be at least 1, temperature at least 0 and top_p in "
            f"(0, 1], got {max_new_tokens}, {batch_size}, {temperature} and {top_p}; change the one out of range"
        )
    device = next(model.parameters()).device
    if workers > 1 and device.type != "cpu":
        raise ValueError(
            f"generate_texts: workers must be 1 for a model that is not on the CPU, got {workers} on {device}; "
            f"leave it out"
        )
    special = sorted(set(tokenizer.all_special_ids))
    # Sorted by length: a batch of prompts of about equal length needs little padding.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def generate(number: int) -> list[Tensor]:
        # torch.Generator takes the lower 32 bits of a seed.
        batch_seed = (seed * 65537 + number) % 2**32
        return _generate_batch(
            model, [ids[i] for i in batches[number]], special, max_new_tokens, temperature, top_p, batch_seed
        )

    texts: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_default_generation(model))
        results: Iterable[list[Tensor]] = map(generate, range(len(batches)))
        if workers > 1:
            pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
            results = stack.enter_context(pool).map(generate, range(len(batches)))
        for rows, batch in zip(batches, results, strict=True):
            texts.update(zip(rows, batch, strict=True))
            if progress is not None:
                progress(len(texts), len(ids), f"{sum(map(len, texts.values()))} tokens")
    return [texts[i] for i in range(len(ids))]


def _generate_batch(
    model: Any,
    prompts: list[Tensor],
    special: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[Tensor]:
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    padded = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    starts = torch.tensor([width - len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=special or None, pad_token_id=0
    )
    with contextlib.ExitStack() as stack:
        processors = []
        if temperature > 0.0:
            processors.append(_Sampler(temperature, top_p, _seeded_generator(device, seed, stack)))
        output = model.generate(
            padded.to(device),
            attention_mask=(torch.arange(width) >= starts[:, None]).long().to(device),
            generation_config=config,
            logits_processor=processors,
        ).cpu()
    texts = []
    for row, start in zip(output, starts.tolist(), strict=True):
        ends = torch.isin(row[width:], torch.tensor(special, dtype=torch.int64)).nonzero()
        texts.append(row[start : width + int(ends[0]) + 1 if len(ends) else None].clone())
    return texts


def _seeded_generator(device: torch.device, seed: int, stack: contextlib.ExitStack) -> torch.Generator | None:
    """A generator on the CPU, whose threads must not share one. On another device the global one, until stack closes.

    Not every backend of torch has generators beside its global one.
    """
    if device.type == "cpu":
        return torch.Generator().manual_seed(seed)
    stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
    torch.manual_seed(seed)
    return None


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def chat_prompts(tokenizer: Any, questions: Iterable[str]) -> list[str]:
    """Questions in the tokenizer's chat template, up to the beginning of the answer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat_prompts: the tokenizer must have a chat template, got none; continue plain text instead")
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        )
        for question in questions
    ]


def opening_prompts(tokenizer: Any, documents: Iterable[str], count: int, tokens: int, seed: int = 0) -> list[Tensor]:
    """The first tokens, int64 [tokens], of ``count`` randomly chosen documents.

    Documents with fewer tokens are left out, so there may be fewer prompts than ``count``.
    """
    pool = list(documents)
    prompts: list[Tensor] = []
    for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(prompts) == count:
            break
        # No tokenizer's tokens have more than 16 characters on average: tokenize only the beginning of a document.
        opening = _encode(tokenizer, pool[i][: 16 * tokens])[:tokens]
        if len(opening) == tokens:
            prompts.append(opening)
    return prompts


def cached_texts(folder: Path, conditions: dict[str, Any], make: Callable[[], list[str]]) -> list[str]:
    """The texts that ``make`` returns, or those that an earlier call with the same conditions wrote to a file.

    Conditions are everything that the texts depend on, as JSON types; the file keeps them too. A version of this module
    is added: texts that an earlier version cached are written again.

    Raises:
        OSError: the file cannot be written.
    """
    conditions = {**conditions, "text_version": _VERSION}
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a missing or damaged file is made again
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["conditions"] == conditions:
            return [str(text) for text in stored["texts"]]
    # A folder that cannot be written to fails here, before the model spends minutes on the texts.
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        texts = make()
        file.write(json.dumps({"conditions": conditions, "texts": texts}).encode())
    return texts
