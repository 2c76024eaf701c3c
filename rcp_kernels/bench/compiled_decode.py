"""Decoding under torch.compile: the demo's model quantized, eager and compiled, against torch bfloat16, all in turn.

``python -m rcp_kernels.bench.compiled_decode --help``. Compiling takes minutes, once for each number of threads.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras, hardware, quantize_model
from ..models.hf import cache_argument
from . import common

EAGER_GROWING = "rcp_kernels eager, growing cache"
EAGER = "rcp_kernels eager, static cache"
COMPILED = "rcp_kernels compiled, static cache"
TORCH_EAGER = "torch bf16 eager, growing cache"
TORCH_COMPILED = "torch bf16 compiled, static cache"

# The first step after a competitor's turn finds its caches cold: it is not timed.
_TURN = 8

_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Decoder:
    """Greedy decoding at batch 1 through ``forward``, which may be compiled, with one of transformers' caches."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], prompt: Tensor, cache: Any) -> None:
        """Run the prompt, int64 [1, tokens], through the model, eagerly."""
        self._forward = forward
        self._cache = cache_argument(model, cache)
        self._position = prompt.shape[1]
        with torch.inference_mode():
            logits: Tensor = model(input_ids=prompt, logits_to_keep=1, **self._cache).logits
            self._token = logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next token, int64 [1, 1]."""
        position = torch.tensor([[self._position]])
        logits: Tensor = self._forward(
            input_ids=self._token, position_ids=position, logits_to_keep=1, **self._cache
        ).logits
        self._position += 1
        self._token = logits[:, -1].argmax(-1, keepdim=True)
        return self._token


@dataclass(frozen=True)
class Result:
    """Median seconds a token of each competitor, and under which conditions."""

    bits: int
    act_bits: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    conditions: dict[str, Any]
    clock: str
    seconds: dict[str, float]

    @property
    def eager_seconds(self) -> float:
        """Of the faster of the two caches."""
        return min(self.seconds[EAGER_GROWING], self.seconds[EAGER])

    @property
    def compiled_over_eager(self) -> float:
        """How many times faster our compiled model decodes than our eager one."""
        return self.eager_seconds / self.seconds[COMPILED]

    @property
    def eager_over_torch(self) -> float:
        """How many times faster our eager model decodes than torch's compiled one in bfloat16."""
        return self.seconds[TORCH_COMPILED] / self.eager_seconds

    @property
    def compiled_over_torch(self) -> float:
        """The same of our compiled model."""
        return self.seconds[TORCH_COMPILED] / self.seconds[COMPILED]


def measure(
    model: nn.Module,
    prompt: Tensor,
    *,
    bits: int = 2,
    act_bits: int = 4,
    group_size: int = 64,
    new_tokens: int = 64,
    backend: str = "inductor",
    clock: str = "wall",
    log: Callable[[str], None] = print,
    ready: Callable[[], None] = lambda: None,
) -> Result:
    """Quantize a copy of a language model by uniform levels, compile both, and let all decode in turns of 8 tokens.

    Speed does not depend on the values of weights: the levels are those that are found fastest.

    Args:
        model: of transformers, in float32; the reference decodes a bfloat16 copy.
        prompt: int64 [1, tokens].
        bits, act_bits, group_size: as quantize_model.
        new_tokens: timed for each competitor, rounded up to whole turns.
        backend: of torch.compile, with fullgraph=True.
        clock: "wall", or "cpu": what the process computed, which other processes disturb less; for one thread.
        log: takes progress lines.
        ready: called after all compilation, before the first timed turn.
    """
    extras.require("transformers")
    from transformers import DynamicCache, StaticCache

    ours = copy.deepcopy(model)
    quantize_model(ours, bits, group_size, act_bits, levels="uniform")
    ours.to(torch.bfloat16)
    reference = copy.deepcopy(model).to(torch.bfloat16)
    turns = -(-new_tokens // _TURN)
    length = prompt.shape[1] + turns * (_TURN + 1) + 4

    def static(decoded: nn.Module, forward: Callable[..., Any]) -> Decoder:
        config: Any = decoded.config
        return Decoder(decoded, forward, prompt, StaticCache(config, max_cache_len=length))

    decoders = {
        EAGER_GROWING: Decoder(ours, ours, prompt, DynamicCache()),
        EAGER: static(ours, ours),
        TORCH_EAGER: Decoder(reference, reference, prompt, DynamicCache()),
    }
    for name, decoded in ((COMPILED, ours), (TORCH_COMPILED, reference)):
        start = time.perf_counter()
        decoders[name] = static(decoded, torch.compile(decoded, fullgraph=True, backend=backend))
        for _ in range(3):
            decoders[name].step()
        log(f"{name}: compiled in {time.perf_counter() - start:.0f} s")
    ready()
    return Result(
        bits=bits,
        act_bits=act_bits,
        group_size=group_size,
        prompt_tokens=prompt.shape[1],
        new_tokens=turns * _TURN,
        threads=torch.get_num_threads(),
        conditions=hardware.conditions(),
        clock=clock,
        seconds=_in_turn(decoders, turns, _CLOCKS[clock]),
    )


def _in_turn(decoders: Mapping[str, Decoder], turns: int, clock: Callable[[], float]) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(turns):
        for name, decoder in decoders.items():
            decoder.step()
            for _ in range(_TURN):
                start = clock()
                decoder.step()
                samples[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def text(result: Result) -> str:
    """The result as a few lines."""
    facts = result.conditions
    lines = [
        f"# W{result.bits}A{result.act_bits} in groups of {result.group_size}, batch 1, {result.new_tokens} tokens "
        f"after {result.prompt_tokens}",
        f"# {facts['cpu']}, {facts['isa']}, {result.threads} threads, torch {facts['torch']}, medians of "
        f"{result.clock} time, in turn",
    ]
    lines += [f"{name:34s} {1e3 * value:7.2f} ms a token" for name, value in result.seconds.items()]
    lines += [
        f"compiled {result.compiled_over_eager:.2f} times as fast as eager; eager {result.eager_over_torch:.2f} times, "
        f"compiled {result.compiled_over_torch:.2f} times as fast as torch bf16 compiled"
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure the demo's model and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--act-bits", type=int, default=4, choices=(4, 8, 16))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock", default="wall", choices=tuple(_CLOCKS), help="cpu: with --threads 1, on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args(arguments)
    from ..data.corpus import held_out_default
    from ..models.load import load_float

    model, tokenizer = load_float("demo")
    prompt = tokenizer(held_out_default()[:1024], return_tensors="pt").input_ids[:, :64]
    with common.torch_threads(options.threads or torch.get_num_threads()):
        result = measure(
            model,
            prompt,
            bits=options.bits,
            act_bits=options.act_bits,
            new_tokens=options.new_tokens,
            clock=options.clock,
        )
    print(text(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
