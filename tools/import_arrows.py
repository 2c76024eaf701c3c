"""Checks the direction of imports inside rcp_kernels: a folder imports only folders listed before it.

``make lint`` runs this. Imports inside functions count too; imports for type checkers alone do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rcp_kernels"

# From the bottom to the top. A name is a folder of rcp_kernels or a module beside the folders.
LAYERS = (
    "extras",
    "formats",
    "ops",
    "triton",
    "hardware",
    "models",
    "nn",
    "evaluation",
    "methods",
    "data",
    "checkpoint",
    "integrations",
    "pipeline",
    "check",
    "bench",
    "demo",
    "cli",
)
# Nothing but the command line imports these.
TOPS = ("check", "bench", "demo")
# Between checkpoint and the top-level package.
ROOT_MODULES = ("__init__", "__main__")


def layer_of(module: str) -> str | None:
    """``rcp_kernels.nn.kv_cache`` is in layer ``nn``. None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "rcp_kernels" and len(parts) > 1 else None


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and full name of everything that a file imports from rcp_kernels."""
    package = ["rcp_kernels", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_imports() -> list[str]:
    """One line for each import that goes against the order."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer in ROOT_MODULES:
            continue
        for line, module in imported_modules(path):
            other = layer_of(module)
            if other is None or other == layer or other == "__version__":
                continue
            if other not in LAYERS or layer not in LAYERS:
                wrong.append(f"{path}:{line}: {layer} imports {module}: name both in LAYERS of {Path(__file__).name}")
            elif LAYERS.index(other) > LAYERS.index(layer) or (other in TOPS and layer != "cli"):
                wrong.append(f"{path}:{line}: {layer} must not import {module}: {other} is above it")
    return wrong


if __name__ == "__main__":
    found = wrong_imports()
    print("\n".join(found) or "imports: every arrow points down")
    sys.exit(bool(found))
