"""The demo's road to few bits without training: GPTQ on the rotated model, calibrated on docstrings, in minutes."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress, TaskID
from torch import Tensor, nn

from ..data.corpus import docstring_corpus, split_windows
from ..evaluation.decoding import generate
from ..evaluation.perplexity import perplexity
from ..methods.gptq.quantize_model import gptq_quantize_model
from ..methods.rotate.rotate_model import rotate_model
from .report import Calibrated, CalibratedResult

__all__ = ["FORMATS", "Calibration", "Format", "calibrated", "read_calibration"]

ROTATION = "gsr"
LEVELS = "kmeans"
# A compromise for minutes: the papers take 128 windows of 2048 tokens (docs/gptq.md has what these give).
WINDOWS = 16
WINDOW = 512
NEW_TOKENS = 48


@dataclass(frozen=True)
class Format:
    """Bits of a weight and of an activation."""

    name: str
    bits: int
    act_bits: int


FORMATS = (Format("W3A16", 3, 16), Format("W2A4", 2, 4))
"""What survives without training, and what does not."""


@dataclass(frozen=True)
class Calibration:
    """Text to calibrate on, int64 [windows, tokens], and the sha256 of what it was taken from."""

    ids: Tensor
    sha256: str


def read_calibration(tokenizer: Any, windows: int = WINDOWS, window: int = WINDOW) -> Calibration:
    """Windows of the standard library's docstrings, without what they share with the text that is measured."""
    corpus = docstring_corpus(("stdlib",))
    ids = tokenizer(corpus.text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return Calibration(split_windows(ids, window)[:windows], corpus.sha256)


def calibrated(
    base: nn.Module,
    tokenizer: Any,
    text_ids: Tensor,
    prompt: str,
    prompt_ids: Tensor,
    calibration: Calibration,
    progress: Progress,
    window: int,
    group_size: int,
    formats: Sequence[Format] = FORMATS,
    new_tokens: int = NEW_TOKENS,
) -> Calibrated:
    """Rotate a copy of a float32 model, quantize it for every format by GPTQ, and measure each, the float one first.

    Args:
        base: left as it is.
        tokenizer: of the model.
        text_ids: int64 [tokens], of the perplexity.
        prompt: for the report; ``prompt_ids`` are its tokens, int64 [1, tokens].
        calibration: see there.
        progress: where the bars go.
        window: tokens of a perplexity window.
        group_size: of the rotation and of the weights.
        formats: to measure after the float model.
        new_tokens: length of the continuation.
    """
    windows, length = calibration.ids.shape
    report = Calibrated(
        method="gptq",
        rotation=ROTATION,
        levels=LEVELS,
        text="docstrings of stdlib",
        sha256=calibration.sha256,
        windows=windows,
        window=length,
        prompt=prompt,
    )

    def measure(model: nn.Module, name: str, bits: float, seconds: float, cpu_seconds: float) -> None:
        task = progress.add_task(f"{name}: perplexity", total=text_ids.numel() // window * window)
        value = perplexity(model, text_ids, window, lambda done: progress.update(task, completed=done))
        answer = generate(model, prompt_ids, new_tokens, tokenizer.eos_token_id)
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        report.results.append(CalibratedResult(name, bits, value, text, seconds, cpu_seconds))

    measure(base, "torch fp32", 32.0, 0.0, 0.0)
    task = progress.add_task(f"rotating by {ROTATION.upper()}", total=None)
    rotating = time.perf_counter(), time.process_time()
    rotated = copy.deepcopy(base)
    rotate_model(rotated, ROTATION, group_size=group_size)
    rotation = time.perf_counter() - rotating[0], time.process_time() - rotating[1]
    progress.update(task, total=1, completed=1)
    for form in formats:
        name = f"{form.name} GPTQ"
        task = progress.add_task(f"{name}: quantizing on {windows * length} tokens", total=None)
        started = time.perf_counter(), time.process_time()
        model = copy.deepcopy(rotated)
        layers = gptq_quantize_model(
            model,
            calibration.ids,
            bits=form.bits,
            group_size=group_size,
            act_bits=form.act_bits,
            levels=LEVELS,
            progress=functools.partial(_layer_done, progress, task),
        )
        seconds = rotation[0] + time.perf_counter() - started[0]
        cpu_seconds = rotation[1] + time.process_time() - started[1]
        weights = sum(packed.out_features * packed.in_features for packed in layers.values())
        measure(model, name, 8 * sum(packed.nbytes for packed in layers.values()) / weights, seconds, cpu_seconds)
    return report


def _layer_done(progress: Progress, task: TaskID, done: int, total: int, _name: str) -> None:
    progress.update(task, completed=done, total=total)
