"""``rcp-kernels info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import __version__, hardware

__all__ = ["EXAMPLES", "info"]

EXAMPLES = """Example:

rcp-kernels info --json"""


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show this machine and installation, missing optional packages, and the commands that install them."""
    facts = hardware.describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    cpu, torch_facts, gpu = facts["cpu"], facts["torch"], facts["gpu"]
    isa = cpu["isa"] + ("" if cpu["isa"] == cpu["isa_supported"] else f" (this CPU supports {cpu['isa_supported']})")
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
