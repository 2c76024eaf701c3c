"""``rcp-kernels quantize``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.by_name import TEXTS
from ..pipeline.recipe import CHOICES, Recipe, read_recipe
from .console import Device, Phases, Threads

__all__ = ["EXAMPLES", "quantize"]

EXAMPLES = """Examples:

rcp-kernels quantize demo -o out

rcp-kernels quantize google/gemma-3-270m -o out --method rtn

rcp-kernels quantize demo -o out --method rcp --steps 100"""

# Options that a method does not use.
_UNUSED = {
    "rtn": ("preset", "text", "sequence", "samples", "steps"),
    "gptq": ("preset", "steps"),
    "rcp": ("levels", "samples"),
    "laquant": ("preset", "levels", "steps"),
}


def _field(name: str, text: str) -> Any:
    """An option for a field of a recipe that has a set of values."""
    return typer.Option(metavar="|".join(map(str, CHOICES[name])), help=text)


# More than 60 lines: typer takes one parameter for each option.
def quantize(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="The float model: a transformers directory, a hub id, a .gguf file, or demo."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The directory to write.", file_okay=False)
    ] = Path("quantized"),
    method: Annotated[
        str | None,
        _field(
            "method",
            "Round to nearest in seconds, GPTQ in minutes (the default), or train by RCP or LAQuant for hours.",
        ),
    ] = None,
    rotation: Annotated[
        str | None,
        _field(
            "rotation",
            "The rotation of the model before it is quantized; the default is gsr for rcp and for 4-bit "
            "activations, else none.",
        ),
    ] = None,
    w_bits: Annotated[
        int | None, _field("w_bits", "Bits of a weight; the default is 4 for rtn and gptq, 3 for laquant, 2 for rcp.")
    ] = None,
    a_bits: Annotated[int | None, _field("a_bits", "Bits of an activation; the default is 4 for rcp, else 16.")] = None,
    kv_bits: Annotated[
        int | None, _field("kv_bits", "Bits of the keys and values in the cache; the default is 4 for rcp, else 16.")
    ] = None,
    group_size: Annotated[
        int | None,
        _field(
            "group_size",
            "Weights that share a table of levels; the default is the largest that divides the model's sizes, or 128.",
        ),
    ] = None,
    levels: Annotated[
        str | None,
        _field("levels", "How rtn and gptq choose levels; the default is kmeans. uniform and clip store fewer bits."),
    ] = None,
    preset: Annotated[str | None, _field("preset", "The budget of rcp; the default is quick.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Updates of rcp instead of the preset's.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(("FILE", "dataset:NAME", *TEXTS)),
            help="The text to calibrate or train on: a file, a dataset of the hub, or text that the model writes; the "
            "default is docstrings, and mixed for rcp.",
        ),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a calibration or training window; the default is 512."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Calibration windows of gptq and laquant; the default is 32.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The random seed; the default is 0.")] = None,
    dtype: Annotated[
        str | None, _field("dtype", "The dtype of everything that is not packed; the default is that of the model.")
    ] = None,
    untie_head: Annotated[
        bool,
        typer.Option("--untie-head", help="Store a tied output head a second time, which vLLM needs with a rotation."),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A recipe.yaml that an earlier run wrote; options given here replace its fields.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a training of rcp or laquant that was stopped.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun, split model and optimizer of rcp over the processes.")
    ] = False,
    dry_run: Annotated[
        bool,
        # Eager: --device looks at it, wherever it stands in the command line.
        typer.Option(
            "--dry-run", is_eager=True, help="Print the memory, disk and time that the run would need, and stop."
        ),
    ] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Quantize a language model into a directory of transformers, with the recipe that makes it again."""
    from ..pipeline.quantize import quantize as run

    fields: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    names = {entry.name for entry in dataclasses.fields(Recipe)}
    given = {
        name: value for name, value in ctx.params.items() if name in names and value is not None and value is not False
    }
    fields.update(given)
    if steps is not None:
        given["steps"] = steps
        fields["training"] = {**fields.get("training", {}), "steps": steps}
    if "model" not in fields:
        raise typer.BadParameter("MODEL is needed, as an argument or in the recipe")
    unused = [f"--{name}" for name in _UNUSED.get(fields.get("method", "gptq"), ()) if name in given]
    if unused:
        raise typer.BadParameter(
            f"method {fields.get('method', 'gptq')} has no use for {', '.join(unused)}; leave it out"
        )
    try:
        chosen = Recipe(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if dry_run:
        from ..pipeline.dry_run import dry_run as needs

        print(needs(chosen, device=device, shard=shard))
        return
    with Phases() as phases:
        summary = run(chosen, out, resume=resume, shard=shard, device=device, progress=phases)
    if summary is not None:
        print(summary)
