"""The command line ``rcp-kernels``: one module for each command.

The commands import the pipeline when they run. ``--help`` is fast then, and a missing package is one line.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__, extras
from . import bench, check, demo, evaluate, generate, info, quantize

app = typer.Typer(
    name="rcp-kernels",
    help="Quantize language models to 2, 3 or 4 bits a weight, and run, measure and time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# main() looks for it, because it may stand anywhere in the command line.
_TRACEBACK = "--traceback"


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show the Python traceback of an error, with any command.")
    ] = False,
) -> None:
    pass


app.command(epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog="Example:\n\nrcp-kernels bench --shape 4096x4096 --batch 1 --bits 2")(bench.bench)
app.command(epilog=check.EXAMPLES)(check.check)
app.command(epilog=info.EXAMPLES)(info.info)


def main() -> None:
    """Entry point of ``rcp-kernels``: exit status 0 on success, 1 on an error, 2 on wrong usage."""
    arguments = [argument for argument in sys.argv[1:] if argument != _TRACEBACK]
    try:
        app(arguments, prog_name="rcp-kernels")
    except (extras.MissingExtra, ValueError, OSError, MemoryError, RuntimeError) as error:
        if _TRACEBACK in sys.argv:
            raise
        raise SystemExit(f"rcp-kernels: {error}") from None
