"""``rcp-kernels demo``: SmolLM2-135M-Instruct before and after its linear layers are packed.

One process measures perplexity, generated text, memory and decode speed of every configuration, with the same text,
the same prompts and the same decode loop. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import hardware
from ..data.by_name import Progress
from ..data.corpus import docstring_corpus, held_out_default, split_windows
from ..evaluation.decoding import decode_seconds, greedy_tokens
from ..evaluation.perplexity import perplexity
from ..models import describe
from ..models.load import DEMO, encode, load_float
from ..nn import storage_report
from ..pipeline import Recipe
from ..pipeline.steps import quantize_layers, rotate
from .report import Report, Result

__all__ = ["CALIBRATED", "CONFIGS", "ROTATED", "ROTATIONS", "Config", "convert", "linear_layers", "measure", "run"]

MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT = "What is the capital of France? Answer in one sentence."
# One right word says little about a calibrated model.
LONG_PROMPT = "Explain what a computer program is."
TEXT_TOKENS = 32
LONG_TEXT_TOKENS = 48
# Calibration in minutes. The papers take 128 windows of 2048 tokens (docs/gptq.md has the results of these 16).
WINDOWS = 16
WINDOW = 512


@dataclass(frozen=True)
class Config:
    """A way to store the model: the recipe of its linear layers (None keeps nn.Linear), and the dtype of the rest."""

    name: str
    dtype: torch.dtype
    recipe: Recipe | None = None


def _recipe(method: str, rotation: str, w_bits: int, a_bits: int) -> Recipe:
    # The hidden size is 576 = 9 * 64: a group of 128 would leave half a group of padding in each row.
    return Recipe(DEMO, method, rotation, w_bits, a_bits, group_size=64, levels="kmeans")


CONFIGS = (
    Config("torch fp32", torch.float32),
    Config("torch bf16", torch.bfloat16),
    Config("W4A8", torch.bfloat16, _recipe("rtn", "none", 4, 8)),
    Config("W3A8", torch.bfloat16, _recipe("rtn", "none", 3, 8)),
    Config("W2A4", torch.bfloat16, _recipe("rtn", "none", 2, 4)),
)
"""Compared in the first table."""

ROTATED = (
    Config("W4A4", torch.bfloat16, _recipe("rtn", "none", 4, 4)),
    Config("W2A4", torch.bfloat16, _recipe("rtn", "none", 2, 4)),
)
"""Measured with each of `ROTATIONS` for the second table."""

ROTATIONS = ("none", "hadamard", "walsh", "gsr")
"""local_hadamard is left out: rounding to nearest gives the same perplexity as with gsr, up to float sums."""

CALIBRATED = (
    Config("torch fp32", torch.float32),
    Config("W3A16 GPTQ", torch.float32, _recipe("gptq", "gsr", 3, 16)),
    Config("W2A4 GPTQ", torch.float32, _recipe("gptq", "gsr", 2, 4)),
)
"""Compared in the third table: few bits without training, and too few."""


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers of the decoder layers, packed or not."""
    return [model.get_submodule(name) for layer in describe(model).layers for name in layer.linears]


def _bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def convert(
    base: nn.Module,
    config: Config,
    ids: Tensor | None = None,
    progress: Progress = lambda *_: None,
    device: torch.device | None = None,
) -> tuple[nn.Module, Result]:
    """A copy of a float32 model stored as ``config`` says, and a Result with its size and the time of the conversion.

    Args:
        base: the model; it is left as it is.
        config: see there.
        ids: int64 [windows, tokens], for a recipe that calibrates.
        progress: see :data:`rcp_kernels.data.by_name.Progress`.
        device: of the copy, and to convert on. None: the device of the model.
    """
    model = copy.deepcopy(base)
    started = time.perf_counter(), time.process_time()
    bits = 8.0 * config.dtype.itemsize
    if config.recipe is not None:
        recipe = config.recipe.resolve(model)
        rotate(model, recipe, device)
        quantize_layers(
            model,
            recipe,
            ids,
            device=device,
            progress=lambda _, done, total, name: progress(f"{config.name}: {recipe.method}", done, total, name),
        )
        bits = storage_report(model).bits_per_weight
    model.to(device, config.dtype)
    return model, Result(
        name=config.name,
        bits_per_weight=bits,
        linear_bytes=sum(map(_bytes, linear_layers(model))),
        model_bytes=_bytes(model),
        swap_seconds=time.perf_counter() - started[0],
        cpu_seconds=time.process_time() - started[1],
    )


def run(
    progress: Progress,
    *,
    tokens: int = 2048,
    window: int = 512,
    new_tokens: int = 64,
    calibrate: bool = True,
    device: str | torch.device | None = None,
) -> Report:
    """Load the model and measure every configuration.

    Args:
        progress: see :data:`rcp_kernels.data.by_name.Progress`.
        tokens: of the text that perplexity is measured on.
        window: tokens of a window of that text.
        new_tokens: decode steps timed for each configuration.
        calibrate: also quantize with GPTQ, which takes most of the time.
        device: as :func:`rcp_kernels.hardware.choose_device` takes it.

    Raises:
        MissingExtra: a package of the extra ``demo`` is missing.
        ValueError: tokens or window cannot be measured.
    """
    device = hardware.choose_device(device)
    progress("reading the model", 0, 1, MODEL_NAME)
    start = time.perf_counter()
    base, tokenizer = load_float(DEMO)
    load_seconds = time.perf_counter() - start
    progress("reading the model", 1, 1, MODEL_NAME)
    # English has about four characters a token: eight are enough.
    ids = encode(tokenizer, held_out_default()[: 8 * max(tokens, window)])[:tokens]
    calibration = None
    if calibrate:
        text = docstring_corpus(("stdlib",)).text
        calibration = split_windows(encode(tokenizer, text), WINDOW)[:WINDOWS]
    return measure(base, tokenizer, ids, calibration, progress, load_seconds, window, new_tokens, device)


def measure(
    base: nn.Module,
    tokenizer: Any,
    ids: Tensor,
    calibration: Tensor | None,
    progress: Progress,
    load_seconds: float,
    window: int,
    new_tokens: int,
    device: torch.device | None = None,
    configs: Sequence[Config] = CONFIGS,
    rotated: Sequence[Config] = ROTATED,
) -> Report:
    """Convert a float32 model to every configuration, and measure each.

    Args:
        base: the model; it is left as it is.
        tokenizer: of the model.
        ids: int64 [tokens], for perplexity; the first 64 are the prompt of the decode speed.
        calibration: int64 [windows, tokens] for the third table; None leaves it out.
        progress, window, new_tokens: as for :func:`run`.
        load_seconds: for the report.
        device: that the configurations are made and measured on. None: the device of the model.
        configs: the first table.
        rotated: the rows of the second table.
    """
    prompt = ids[:64].unsqueeze(0)
    report = Report(
        model=MODEL_NAME,
        perplexity_tokens=ids.numel() // window * window,
        perplexity_window=window,
        decode_prompt_tokens=prompt.shape[1],
        decode_new_tokens=new_tokens,
        load_seconds=load_seconds,
        threads=torch.get_num_threads(),
        conditions=hardware.conditions(device),
        prompt=PROMPT,
        long_prompt=LONG_PROMPT,
        calibration_windows=0 if calibration is None else len(calibration),
        calibration_window=0 if calibration is None else calibration.shape[1],
    )
    judge = _Judge(ids, window, report.perplexity_tokens, progress)
    models: dict[str, nn.Module] = {}
    for config in configs:
        models[config.name], result = convert(base, config, None, progress, device)
        result.perplexity = judge(config.name, models[config.name])
        result.text = _answer(models[config.name], tokenizer, PROMPT, TEXT_TOKENS)
        report.results.append(result)
    for done, medians in decode_seconds(models, prompt, new_tokens):
        progress("decode speed, all in turn", done, new_tokens, "")
        for result in report.results:
            result.seconds_per_token = medians[result.name]
    models.clear()
    for config in rotated:
        report.rotated[config.name] = _rotated_row(base, config, judge, progress, device)
    for config in CALIBRATED if calibration is not None else ():
        model, result = convert(base, config, calibration, progress, device)
        result.perplexity = judge(config.name, model)
        result.text = _answer(model, tokenizer, LONG_PROMPT, LONG_TEXT_TOKENS)
        report.calibrated.append(result)
    return report


class _Judge:
    """The perplexity of a model by the name of its configuration; each name is measured once."""

    def __init__(self, ids: Tensor, window: int, tokens: int, progress: Progress) -> None:
        self._ids, self._window, self._tokens, self._progress = ids, window, tokens, progress
        self.known: dict[str, float] = {}

    def __call__(self, name: str, model: nn.Module) -> float:
        def done(tokens: int) -> None:
            self._progress(f"{name}: perplexity", tokens, self._tokens, "")

        if name not in self.known:
            self.known[name] = perplexity(model, self._ids, self._window, done)
        return self.known[name]


def _rotated_row(
    base: nn.Module, config: Config, judge: _Judge, progress: Progress, device: torch.device | None
) -> dict[str, float]:
    """The perplexity of a configuration with each rotation."""
    assert config.recipe is not None
    row = {}
    for rotation in ROTATIONS:
        name = config.name if rotation == "none" else f"{config.name} {rotation}"
        if name not in judge.known:
            recipe = dataclasses.replace(config.recipe, rotation=rotation)
            judge(name, convert(base, Config(name, config.dtype, recipe), None, progress, device)[0])
        row[rotation] = judge.known[name]
    return row


def _answer(model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The model's greedy answer to a question in its chat template."""
    messages = [{"role": "user", "content": prompt}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = greedy_tokens(model, chat["input_ids"], new_tokens, stop_token=tokenizer.eos_token_id)
    return str(tokenizer.decode(tokens[0].tolist(), skip_special_tokens=True)).strip()
