"""The typer commands of this package; :func:`register` adds them to the application."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["register"]


class Method(str, enum.Enum):
    rtn = "rtn"
    gptq = "gptq"
    rcp = "rcp"
    laquant = "laquant"


class RotationName(str, enum.Enum):
    none = "none"
    hadamard = "hadamard"
    walsh = "walsh"
    local_hadamard = "local_hadamard"
    gsr = "gsr"


class Levels(str, enum.Enum):
    uniform = "uniform"
    clip = "clip"
    kmeans = "kmeans"


class Dtype(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Preset(str, enum.Enum):
    quick = "quick"
    full = "full"


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A transformers directory, a hub id, a .gguf file, or demo.")
]
# Options of quantize that are fields of a recipe: what was not given must not override the recipe's.
_FIELDS = (
    "method rotation w_bits a_bits kv_bits group_size levels preset text sequence samples seed dtype untie_head".split()
)
# Of these, what a method has no use for.
_UNUSED = {
    "rtn": ("preset", "text", "sequence", "samples"),
    "gptq": ("preset",),
    "rcp": ("levels", "samples"),
    "laquant": ("preset", "levels"),
}


def register(app: typer.Typer) -> None:
    """Add quantize, eval and generate to the application."""
    app.command()(quantize)
    app.command(name="eval")(evaluate)
    app.command()(generate)


def quantize(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A transformers directory, a hub id, a .gguf file, or demo."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", file_okay=False)] = Path("quantized"),
    method: Annotated[Method, typer.Option(help="How levels and codes are chosen.")] = Method.gptq,
    rotation: Annotated[RotationName, typer.Option(help="Of the model, before it is quantized.")] = RotationName.gsr,
    w_bits: Annotated[int, typer.Option(min=2, max=4, help="Bits of a weight.")] = 2,
    a_bits: Annotated[int, typer.Option(help="Of an activation: 4, 8 or 16.")] = 16,
    kv_bits: Annotated[int, typer.Option(help="Of keys and values: 4 or 16.")] = 16,
    group_size: Annotated[
        int | None, typer.Option(help="32, 64 or 128; the largest that divides the model's sizes without it.")
    ] = None,
    levels: Annotated[Levels, typer.Option(help="Of rtn and gptq.")] = Levels.kmeans,
    preset: Annotated[Preset, typer.Option(help="Budget of rcp.")] = Preset.quick,
    text: Annotated[
        str | None,
        typer.Option(
            help="To calibrate or train on: a file, dataset:NAME, mixed (docstrings, comments, and what the model "
            "writes), generated (what the model writes) or reasoning (its answers step by step); without it mixed for "
            "rcp, else docstrings."
        ),
    ] = None,
    sequence: Annotated[int | None, typer.Option(min=2, help="Tokens of a window.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of gptq and laquant.")] = 32,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of what is not packed; the model's own without it (GGUF: bfloat16).")
    ] = None,
    untie_head: Annotated[
        bool,
        typer.Option("--untie-head", help="Store a tied output head a second time, so that vLLM runs a rotated model."),
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Take what is not given here from this YAML file.", exists=True, dir_okay=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Of rcp under torchrun: split model and optimizer over the processes.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default without it.")] = None,
) -> None:
    """Quantize a language model into a directory, with the recipe that makes it again."""
    from ..pipeline.recipe import Recipe, read_recipe

    fields: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    if model is not None:
        fields["model"] = model
    if "model" not in fields:
        raise typer.BadParameter("MODEL is needed, as an argument or in the recipe")
    given = []
    for name in _FIELDS:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given.append(name)
            value = ctx.params[name]
            fields[name] = value.value if isinstance(value, enum.Enum) else value
    try:
        chosen = Recipe(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    unused = [f"--{name}" for name in _UNUSED[chosen.method] if name in given]
    if unused:
        raise typer.BadParameter(f"method {chosen.method} has no use for {', '.join(unused)}; leave it out")
    _set_threads(threads)
    from ..pipeline.quantize import quantize as run

    with _bars() as bars:
        summary = run(chosen, out, resume=resume, shard=shard, progress=_Reporter(bars))
    if summary is not None:
        print(summary)


def evaluate(
    model: ModelName,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text; pydoc's topics without it.", exists=True, dir_okay=False)
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext, or another dataset of the hub.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of the text, at most.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    divergence_from: Annotated[
        str | None, typer.Option(help="Also measure where greedy decoding leaves that of this model.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decoded for that after each of 16 prompts.")] = 128,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the result there.", dir_okay=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default without it.")] = None,
) -> None:
    """Measure the perplexity of a quantized, or float, model."""
    if text is not None and dataset is not None:
        raise typer.BadParameter("--text and --dataset exclude each other")
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise typer.BadParameter(f"--json needs a directory that exists, got {json_path.parent}; make it first")
    _set_threads(threads)
    from ..pipeline.evaluate import evaluate as run

    with _bars() as bars:
        task = bars.add_task("perplexity", total=tokens)
        result = run(
            model,
            text,
            dataset,
            tokens=tokens,
            window=window,
            divergence_from=divergence_from,
            new_tokens=new_tokens,
            progress=lambda done: bars.update(task, completed=done),
        )
    print(f"perplexity {result.perplexity:.3f}  ({result.tokens} tokens of {result.text}, windows of {result.window})")
    if result.divergence is not None:
        found = result.divergence
        print(
            f"greedy decoding leaves {found.reference} after {found.mean:.1f} tokens on average, {found.median:g} in "
            f"the median, of {found.new_tokens} ({len(found.positions)} prompts of {found.prompt_tokens} tokens); "
            f"{found.agreement:.1%} of its tokens agree"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="What to continue, or ask.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if any.")] = True,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens by chance, from logits divided by this. The likeliest without it.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens that have this probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed: draws the same tokens again.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default without it.")] = None,
) -> None:
    """Continue a prompt, greedily unless an option of sampling is given."""
    if not prompt:
        raise typer.BadParameter("--prompt needs a text, got an empty one; pass what to continue")
    _set_threads(threads)
    from ..pipeline.evaluate import check_sampling
    from ..pipeline.evaluate import generate as run

    try:
        check_sampling(temperature, top_p, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    text = run(model, prompt, new_tokens=new_tokens, chat=chat, temperature=temperature, top_p=top_p, seed=seed)
    print(text)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _bars() -> Progress:
    """Bars on standard error, so that standard output holds the results only."""
    return Progress(
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
    )


class _Reporter:
    """One bar a phase."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int, text: str) -> None:
        if phase == "validation":
            self._bars.console.print(f"step {done}: {text}", markup=False, highlight=False)
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, description=f"{phase}: {text}")
