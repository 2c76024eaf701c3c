"""Text that a model writes itself: continuations of prompts by sampling, in batches, from a fixed seed.

BitDistiller (Du et al. 2024, arXiv 2402.10631) trains a student on its teacher's own generations at temperature 0.7:
they are where the teacher's distribution says something, and no data set is needed but prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.hf import cache_argument

__all__ = ["cached_texts", "chat_prompts", "generate_texts", "opening_prompts"]

# Of the most probable tokens, before all 49152 are sorted for top_p: nearly always enough.
_CANDIDATES = 512


class _GrowingCache:
    """Keys and values of all layers in memory that is allocated once, for sequences of equal length.

    transformers' DynamicCache copies all it has at every token; its StaticCache hands out the unused end as well, with
    a mask, which costs the fast attention.
    """

    is_compileable = False

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = tuple(x.new_empty((*x.shape[:2], self._limit, x.shape[3])) for x in (keys, values))  # type: ignore[assignment]
        end = self._length + keys.shape[2]
        for store, new in zip(self._layers[layer], (keys, values), strict=True):
            store[:, :, self._length : end] = new
        return tuple(store[:, :, :end] for store in self._layers[layer])  # type: ignore[return-value]

    def advance(self, tokens: int) -> None:
        """To be called after each forward pass."""
        self._length += tokens

    def keep(self, rows: Tensor) -> None:
        """Drop the other sequences."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._length

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return self._length

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self._length + length, 0


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """transformers' attention through SDPA, except for one new token without a mask.

    There the query heads that share a key head become the queries of one: 128 sequences of 128 tokens took 2.3 ms
    instead of the 12.9 of ``enable_gqa`` (9 heads of 64 on 3, bfloat16, two cores).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None or query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    folded = query.view(*key.shape[:2], -1, query.shape[3])
    output = functional.scaled_dot_product_attention(folded, key, value, scale=keywords.get("scaling"))
    return output.reshape(query.shape).transpose(1, 2), None


@contextlib.contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """The model with :func:`_attention`, if it has SDPA's."""
    before = model.config._attn_implementation
    if before == "sdpa":
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register("rcp_generation", _attention)
        AttentionMaskInterface.register("rcp_generation", sdpa_mask)
        model.config._attn_implementation = "rcp_generation"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row: [rows, vocabulary] and a number in [0, 1) for each row -> int64 [rows].

    By the inverse of the cumulative distribution: torch.multinomial draws a random number for each of the tokens.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    order = None
    if top_p < 1.0:
        count = min(_CANDIDATES, logits.shape[-1])
        largest, order = probabilities.topk(count)
        if count < logits.shape[-1] and bool((largest.sum(-1) < top_p).any()):
            largest, order = probabilities.sort(-1, descending=True)
        before = largest.cumsum(-1) - largest
        probabilities = torch.where(before < top_p, largest, 0.0)
    cumulative = probabilities.cumsum(-1)
    # The first entry above a number that is below the last one: of a token whose probability is not 0. (The largest
    # draw is 1 - 2**-24; its product with any float32 rounds to less than that.)
    chosen = torch.searchsorted(cumulative, draws.unsqueeze(-1) * cumulative[:, -1:], right=True)
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)


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
    """Let a model continue prompts, each until its first special token or ``max_new_tokens``.

    The prompts of a batch need no padding: its rows start together, and a row whose prompt is longer than the shortest
    takes its own tokens before it begins to sample. The random numbers depend on seed and place in the batches
    only. The same arguments on the same machine give the same tokens; another number of threads gives other float
    sums and, in the end, other text.

    Args:
        model: a causal language model of transformers, in eval mode; computes in its own dtype, so a bfloat16 copy is
            what is fast.
        tokenizer: its tokenizer; any of ``all_special_ids`` ends a text.
        prompts: text, tokenized without adding special tokens, or int64 [tokens]; at least one token each.
        max_new_tokens: of each text.
        temperature: 0 takes the most probable token.
        top_p: of the probability; the least probable tokens beyond it are left out.
        seed: of the sampling.
        batch_size: prompts at a time.
        workers: threads that each take a batch at a time, on one core; 1 leaves it to torch. On a CPU that other jobs
            use as well, two cores that work on one matrix wait for each other at every operator. The text is that of
            torch with one thread, whatever their number.
        progress: called with the texts finished, their number, and a text.

    Returns:
        For each prompt int64 [tokens]: the prompt and its continuation, with the special token that ended it.

    Raises:
        ValueError: a prompt without a token, or an argument out of its range.
    """
    ids = [prompt if isinstance(prompt, Tensor) else _encode(tokenizer, prompt) for prompt in prompts]
    for number, prompt in enumerate(ids):
        if prompt.dim() != 1 or not prompt.numel():
            raise ValueError(
                f"generate_texts: every prompt must have a token at least, got shape {tuple(prompt.shape)} for prompt "
                f"{number}; leave it out"
            )
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0.0 or not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"generate_texts: max_new_tokens and batch_size must be at least 1, temperature at least 0 and top_p in "
            f"(0, 1], got {max_new_tokens}, {batch_size}, {temperature} and {top_p}; change the one out of range"
        )
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    # Prompts of about one length together: the longest prompt of a batch decides how many steps it takes.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def generate(number: int) -> list[Tensor]:
        prompts_ = [ids[i] for i in batches[number]]
        # torch's generator takes the lower 32 bits of a seed.
        own_seed = (seed * 65537 + number) % 2**32
        return _generate_batch(model, prompts_, special, max_new_tokens, temperature, top_p, own_seed)

    texts: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_attention(model))
        results: Iterable[list[Tensor]] = map(generate, range(len(batches)))
        if workers > 1:
            pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
            results = stack.enter_context(pool).map(generate, range(len(batches)))
        for rows, batch in zip(batches, results, strict=True):
            texts.update(zip(rows, batch, strict=True))
            if progress is not None:
                progress(len(texts), len(ids), f"{sum(map(len, texts.values()))} tokens")
    return [texts[i] for i in range(len(ids))]


@torch.inference_mode()
def _generate_batch(
    model: nn.Module,
    prompts: list[Tensor],
    special: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[Tensor]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    shortest, limit = int(lengths.min()), int(lengths.max()) + max_new_tokens
    tokens = torch.zeros((len(prompts), limit), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = lengths + max_new_tokens
    rows = torch.arange(len(prompts))  # those in the cache; some of them may have ended
    cache = _GrowingCache(limit)
    position, fed = 0, tokens[:, :shortest]
    while True:
        logits = model(
            input_ids=fed.to(device),
            use_cache=True,
            position_ids=torch.arange(position, position + fed.shape[1], device=device)[None],
            logits_to_keep=1,
            **cache_argument(model, cache),
        ).logits[:, -1]
        cache.advance(fed.shape[1])
        position += fed.shape[1]
        # For all rows, so that those that ended do not change the numbers of the others.
        draws = torch.rand(len(prompts), generator=generator)[rows]
        sampled = _sample(logits, draws.to(device), temperature, top_p).cpu()
        writes = lengths[rows] <= position
        tokens[rows[writes], position] = sampled[writes]
        ended = writes & torch.isin(sampled, special)
        ends[rows[ended]] = torch.minimum(ends[rows[ended]], torch.tensor(position + 1))
        going = ends[rows] > position + 1
        if not bool(going.any()):
            break
        if 2 * int(going.sum()) <= len(rows):
            cache.keep(going.nonzero()[:, 0].to(device))
            rows = rows[going]
        fed = tokens[rows, position : position + 1]
    return [row[:end].clone() for row, end in zip(tokens, ends.tolist(), strict=True)]


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def chat_prompts(tokenizer: Any, questions: Iterable[str]) -> list[str]:
    """Questions in the tokenizer's chat template, up to where the answer begins.

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
    """The first tokens of documents, chosen at random, each once.

    Args:
        tokenizer: of the model that will continue them.
        documents: text.
        count: of the prompts; all documents that are long enough, if they are fewer.
        tokens: of a prompt; a shorter document is left out.
        seed: of the choice.

    Returns:
        int64 [tokens] each.
    """
    pool = list(documents)
    prompts: list[Tensor] = []
    for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(prompts) == count:
            break
        # No tokenizer makes more characters of a token than this, on average: a document need not be tokenized whole.
        opening = _encode(tokenizer, pool[i][: 16 * tokens])[:tokens]
        if len(opening) == tokens:
            prompts.append(opening)
    return prompts


def cached_texts(folder: Path, conditions: dict[str, Any], make: Callable[[], list[str]]) -> list[str]:
    """What ``make`` returns, or what an earlier call with the same conditions wrote.

    Args:
        folder: of the cache, made if it is not there.
        conditions: all that the texts depend on, as JSON types; kept in the file beside them.
        make: makes the texts.

    Raises:
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged: made again
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["conditions"] == conditions:
            return [str(text) for text in stored["texts"]]
    # Before minutes of writing, and not after them: a folder that is not there to be written to.
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    try:
        texts = make()
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"conditions": conditions, "texts": texts}, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return texts
