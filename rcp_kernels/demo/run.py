"""The demo: a real LLaMA-architecture model before and after its linear layers become QuantLinear.

Everything is measured in one process on one machine: perplexity, generated text, memory, and decode speed, with the
same text, the same prompt and the same decode loop for every configuration. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from .. import OnlineRotation, QuantLinear, hardware, quantize_model
from ..data.corpus import held_out_default
from ..evaluation.decoding import decode_seconds, generate
from ..evaluation.perplexity import perplexity
from ..models.load import DEMO, load_float
from .gptq import calibrated, read_calibration
from .report import Report, Result

# SmolLM2-135M has hidden size 576 = 9 * 64: a group of 128 would leave half a group of padding in each row.
GROUP_SIZE = 64
MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT = "What is the capital of France? Answer in one sentence."
# For the formats that are calibrated: one word that is right says little of a model.
LONG_PROMPT = "Explain what a computer program is."


@dataclass(frozen=True)
class Config:
    """One way to store the linear layers: `bits` is None for a model that keeps nn.Linear in `dtype`."""

    name: str
    dtype: torch.dtype
    bits: int | None = None
    act_bits: int = 16


@dataclass(frozen=True)
class Rotation:
    """One way to rotate the input of every linear layer: rows in `order`, over all features or inside each group."""

    order: str
    grouped: bool

    @property
    def name(self) -> str:
        return "either grouped" if self.grouped else f"{self.order} global"

    def of(self, linear: nn.Linear, group_size: int) -> OnlineRotation:
        """The rotation of this layer's input."""
        return OnlineRotation(linear.in_features, group_size if self.grouped else None, self.order)


CONFIGS = (
    Config("torch fp32", torch.float32),
    Config("torch bf16", torch.bfloat16),
    Config("W4A8", torch.bfloat16, bits=4, act_bits=8),
    Config("W3A8", torch.bfloat16, bits=3, act_bits=8),
    Config("W2A4", torch.bfloat16, bits=2, act_bits=4),
)

# Measured with each rotation: four bits a weight show what it does for 4-bit activations, two bits what is left to do.
ROTATED_CONFIGS = (
    Config("W4A4", torch.bfloat16, bits=4, act_bits=4),
    Config("W2A4", torch.bfloat16, bits=2, act_bits=4),
)
# Grouped, natural order gives the same codes as sequency order, in another order, and the same bits come out of the
# layer (tests/nn/test_online_rotation.py): one of the two is measured.
ROTATIONS = (
    Rotation("natural", grouped=False),
    Rotation("sequency", grouped=False),
    Rotation("sequency", grouped=True),
)


def linear_layers(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> list[nn.Linear | QuantLinear]:
    """The model's linear layers, quantized or not, less those whose last name component is in skip."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantLinear) and name.rpartition(".")[2] not in skip
    ]


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of module, shared ones counted once."""
    return sum(t.nbytes for t in module.parameters()) + sum(t.nbytes for t in module.buffers())


def convert(
    base: nn.Module, config: Config, load_seconds: float, progress: Progress, group_size: int = GROUP_SIZE
) -> tuple[nn.Module, Result]:
    """A copy of the float32 model `base` stored as `config` says, and the Result with its cost so far."""
    model = copy.deepcopy(base)
    layers = linear_layers(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    task = progress.add_task(f"{config.name}: swapping {len(layers)} layers", total=len(layers))
    start = time.perf_counter()
    bits_per_weight = 8.0 * config.dtype.itemsize
    if config.bits is not None:
        report = quantize_model(
            model,
            bits=config.bits,
            group_size=group_size,
            act_bits=config.act_bits,
            levels="kmeans",
            progress=lambda *_: progress.advance(task),
        )
        bits_per_weight = report.bits_per_weight
    model.to(config.dtype)
    seconds = time.perf_counter() - start
    progress.update(task, completed=len(layers))
    linear_bytes = sum(tensor_bytes(layer) for layer in linear_layers(model))
    assert linear_bytes * 8 >= bits_per_weight * weights * 0.99
    return model, Result(config.name, bits_per_weight, linear_bytes, tensor_bytes(model), load_seconds, seconds)


def rotate_and_convert(
    base: nn.Module, config: Config, rotation: Rotation | None, progress: Progress, group_size: int = GROUP_SIZE
) -> nn.Module:
    """A copy of `base` stored as `config` says, each layer with `rotation` folded in and applied to its input."""
    model = copy.deepcopy(base)
    assert config.bits is not None
    layers = linear_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    title = "no rotation" if rotation is None else rotation.name
    for layer in progress.track(layers, description=f"{config.name}, {title}: swapping {len(layers)} layers"):
        assert isinstance(layer, nn.Linear)
        parent, _, child = names[id(layer)].rpartition(".")
        packed = QuantLinear.from_linear(
            layer,
            config.bits,
            group_size,
            config.act_bits,
            input_rotation=None if rotation is None else rotation.of(layer, group_size),
        )
        setattr(model.get_submodule(parent), child, packed)
    return model.to(config.dtype)


def run(
    progress: Progress,
    *,
    tokens: int = 2048,
    window: int = 512,
    new_tokens: int = 64,
    text_tokens: int = 32,
    configs: Sequence[Config] = CONFIGS,
    rotated_configs: Sequence[Config] = ROTATED_CONFIGS,
    calibrate: bool = True,
) -> Report:
    """Load the model, convert it to every configuration, and measure each.

    Args:
        progress: where the bars go.
        tokens: tokens of the perplexity text.
        window: tokens of one perplexity window.
        new_tokens: decode steps timed per configuration.
        text_tokens: length of the generated answer.
        configs: what to compare.
        rotated_configs: what to measure the perplexity of with every rotation.
        calibrate: also quantize by GPTQ on the rotated model, which takes most of the time.

    Raises:
        MissingExtra: a package of the extra ``demo`` is missing.
        ValueError: tokens or window cannot be measured.
    """
    task = progress.add_task(f"loading {MODEL_NAME}", total=None)
    start = time.perf_counter()
    base, tokenizer = load_float(DEMO)
    load_seconds = time.perf_counter() - start
    progress.update(task, total=1, completed=1)

    # About 4.1 characters make a token; 8 characters for each leave no doubt that there are enough.
    ids = tokenizer(held_out_default()[: 8 * max(tokens, window)], return_tensors="pt").input_ids[0, :tokens]
    report = measure(
        base,
        tokenizer,
        ids,
        _chat(tokenizer, PROMPT),
        progress,
        load_seconds,
        window,
        new_tokens,
        text_tokens,
        configs,
        rotated_configs,
    )
    if calibrate:
        task = progress.add_task("reading docstrings to calibrate on", total=None)
        calibration = read_calibration(tokenizer)
        progress.update(task, total=1, completed=1)
        chat_ids = _chat(tokenizer, LONG_PROMPT)
        report.calibrated = calibrated(
            base, tokenizer, ids, LONG_PROMPT, chat_ids, calibration, progress, window, GROUP_SIZE
        )
    return report


def _chat(tokenizer: Any, prompt: str) -> Tensor:
    """A question as the model was tuned to be asked, int64 [1, tokens]."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: Tensor = chat["input_ids"]
    return ids


def measure(
    base: nn.Module,
    tokenizer: Any,
    text_ids: Tensor,
    chat_ids: Tensor,
    progress: Progress,
    load_seconds: float,
    window: int,
    new_tokens: int,
    text_tokens: int,
    configs: Sequence[Config] = CONFIGS,
    rotated_configs: Sequence[Config] = ROTATED_CONFIGS,
) -> Report:
    """Convert `base` to every configuration and measure it on text_ids, int64 [tokens], and chat_ids, [1, tokens]."""
    prompt = text_ids[:64].unsqueeze(0)
    report = Report(
        model=MODEL_NAME,
        group_size=GROUP_SIZE,
        levels="kmeans",
        perplexity_tokens=text_ids.numel() // window * window,
        perplexity_window=window,
        decode_prompt_tokens=prompt.shape[1],
        decode_new_tokens=new_tokens,
        threads=torch.get_num_threads(),
        conditions=hardware.conditions(),
        prompt=PROMPT,
    )
    models: dict[str, nn.Module] = {}
    for config in configs:
        model, result = convert(base, config, load_seconds, progress)
        models[config.name] = model
        report.results.append(result)
        task = progress.add_task(f"{config.name}: perplexity", total=report.perplexity_tokens)
        result.perplexity = perplexity(model, text_ids, window, functools.partial(_completed, progress, task))
        answer = generate(model, chat_ids, text_tokens, tokenizer.eos_token_id)
        result.text = tokenizer.decode(answer, skip_special_tokens=True).strip()

    task = progress.add_task("decode speed, all configurations in turn", total=new_tokens)
    for done, medians in decode_seconds(models, prompt, new_tokens):
        progress.update(task, completed=done)
        for result in report.results:
            result.seconds_per_token = medians[result.name]

    measured = {config: result.perplexity for config, result in zip(configs, report.results, strict=True)}
    for config in rotated_configs:
        row = report.rotated[config.name] = {}
        for rotation in (None, *ROTATIONS):
            if rotation is None and config in measured:
                row["none"] = measured[config]
                continue
            model = rotate_and_convert(base, config, rotation, progress)
            row["none" if rotation is None else rotation.name] = perplexity(model, text_ids, window)
    return report


def _completed(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)
