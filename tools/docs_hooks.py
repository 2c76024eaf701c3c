"""Fills the generated parts of the reference: the operators' schemas, the command line, the fields of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def schemas() -> str:
    """Every schema of ``torch.ops.rcp_kernels``, from the compiled library."""
    import torch

    import rcp_kernels  # noqa: F401  (registers the operators)

    found = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("rcp_kernels::"))
    return "```\n" + "\n".join(found) + "\n```"


def command_line() -> str:
    """The help of every command, as plain text."""
    import typer

    from rcp_kernels.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(_help_of(group, ["rcp-kernels"]))


def _help_of(command: Any, path: list[str]) -> Iterator[str]:
    yield f"## {' '.join(path)}"
    yield (command.help or "").strip()
    rows = [
        f"| `{', '.join(p.opts) if p.param_type_name == 'option' else p.name.upper()}` | {_default(p)} "
        f"| {(getattr(p, 'help', None) or '').replace('|', '/')} |"
        for p in command.params
        if p.name != "help"
    ]
    if rows:
        yield "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])
    if command.epilog:
        yield str(command.epilog)
    for name, inner in getattr(command, "commands", {}).items():
        yield from _help_of(inner, [*path, name])


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or callable(value) or parameter.required:
        return ""
    return f"`{getattr(value, 'value', value)}`"


def recipe() -> str:
    """The fields of a recipe with their types and defaults."""
    from rcp_kernels.pipeline.recipe import Recipe

    def default(field: dataclasses.Field[Any]) -> Any:
        if field.default is not dataclasses.MISSING:
            return field.default
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return "required"

    rows = [f"| `{field.name}` | `{field.type}` | `{default(field)}` |" for field in dataclasses.fields(Recipe)]
    return "| field | type | default |\n|---|---|---|\n" + "\n".join(row.replace(" | None", " or None") for row in rows)


PARTS: dict[str, Callable[[], str]] = {
    "<!-- schemas -->": schemas,
    "<!-- command line -->": command_line,
    "<!-- recipe -->": recipe,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    for mark, make in PARTS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown
