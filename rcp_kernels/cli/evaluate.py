"""``rcp-kernels eval``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .console import Device, JsonPath, ModelDType, ModelName, Phases, Threads, torch_dtype, write_json

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = """Examples:

rcp-kernels eval out

rcp-kernels eval out --text held_out.txt --divergence-from demo --json eval.json"""


def evaluate(
    model: ModelName,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The text to measure on; the default is the topics of pydoc.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure on the test split of a dataset of the hub, such as wikitext."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Use at most so many tokens of the text.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens that the model sees at once.")] = 512,
    divergence_from: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure how long greedy decoding stays the same as this model's."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens decoded after each of 16 prompts for --divergence-from; the default is 128."),
    ] = None,
    device: Device = None,
    dtype: ModelDType = None,
    json_path: JsonPath = None,
    threads: Threads = None,
) -> None:
    """Measure the perplexity of a quantized or float model on text that it was not calibrated on."""
    if text is not None and dataset is not None:
        raise typer.BadParameter("--text and --dataset exclude each other")
    if new_tokens is not None and divergence_from is None:
        raise typer.BadParameter("--new-tokens needs --divergence-from")
    from ..pipeline.evaluate import evaluate as run

    with Phases() as phases:
        result = run(
            model,
            text,
            dataset,
            tokens=tokens,
            window=window,
            divergence_from=divergence_from,
            new_tokens=128 if new_tokens is None else new_tokens,
            device=device,
            dtype=torch_dtype(dtype),
            progress=phases,
        )
    print(
        f"perplexity {result.perplexity:.3f}  ({result.tokens} tokens of {result.text}, windows of {result.window}; "
        f"{result.dtype} on {result.device})"
    )
    if result.divergence is not None:
        found = result.divergence
        print(
            f"greedy decoding leaves {found.reference} after {found.mean:.1f} tokens on average, {found.median:g} in "
            f"the median, of {found.new_tokens} ({len(found.positions)} prompts of {found.prompt_tokens} tokens); "
            f"{found.agreement:.1%} of its tokens agree"
        )
    write_json(json_path, dataclasses.asdict(result))
