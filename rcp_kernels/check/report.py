"""The outcomes of a check, as a table, JSON and Markdown, and the card that they were measured on."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import __version__, extras, hardware
from ..ops import cuda_library
from .cases import FAIL, PASS, SKIPPED, Outcome

__all__ = ["Report", "card_facts"]

UNKNOWN = "unknown"
_QUERIES = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "most_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def card_facts(device: torch.device) -> dict[str, str]:
    """Name, capability, memory, clocks and driver of a card; "unknown" for what cannot be read. The CPU's name else.

    Clocks are those of the moment, from nvidia-smi.
    """
    facts = {"device": str(device)}
    if device.type == "cpu":
        return facts | {"card": hardware.cpu_name(), "kernels": hardware.cpu_isa()}
    if device.type != "cuda":
        return facts | {"card": UNKNOWN}
    try:
        card = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):
        return facts | dict.fromkeys(("card", *_QUERIES), UNKNOWN)
    facts |= {
        "card": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": str(card.multi_processor_count),
        "l2_mb": f"{card.L2_cache_size / 2**20:.0f}",
        "memory_gb": f"{card.total_memory / 1e9:.0f}",
        "cuda": str(torch.version.cuda),
    }
    return facts | _nvidia_smi(str(getattr(card, "uuid", "")))


def _nvidia_smi(uuid: str) -> dict[str, str]:
    unknown = dict.fromkeys(_QUERIES, UNKNOWN)
    program = shutil.which("nvidia-smi")
    if program is None:
        return unknown
    command = [program, f"--query-gpu={','.join(_QUERIES.values())}", "--format=csv,noheader"]
    # CUDA_VISIBLE_DEVICES renumbers torch's devices, but not those of nvidia-smi. A container may hide the id: there
    # the first card is the only one.
    for chosen in ([f"--id=GPU-{uuid}"], []):
        try:
            done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
        if len(values) == len(_QUERIES):
            return dict(zip(_QUERIES, values, strict=True))
    return unknown


@dataclass(frozen=True)
class Line:
    """One line of the summary: all cases of an op and a kind."""

    op: str
    kind: str
    outcomes: Sequence[Outcome]

    @property
    def status(self) -> str:
        found = [outcome.status for outcome in self.outcomes]
        if FAIL in found:
            return FAIL
        return SKIPPED if SKIPPED in found and PASS not in found else PASS

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Op, kind, cases, worst error, worst share of the bound, result."""
        errors = [outcome.error for outcome in self.outcomes if outcome.error is not None]
        ratios = [outcome.ratio for outcome in self.outcomes if outcome.ratio is not None]
        failed = sum(outcome.status == FAIL for outcome in self.outcomes)
        result = self.status
        if failed:
            result = f"FAIL {failed} of {len(self.outcomes)}"
        elif result == SKIPPED:
            result = f"skipped: {self.outcomes[0].note}"
        share = f"{max(ratios):.2f}" if ratios else ("-" if not errors else "equal" if not any(errors) else "differs")
        return self.op, self.kind, str(len(self.outcomes)), f"{max(errors):.2g}" if errors else "-", share, result


@dataclass(frozen=True)
class Report:
    """The result of :func:`rcp_kernels.check.check_device`.

    Attributes:
        device: that was checked.
        outcomes: one for each case, in order.
        card: of :func:`card_facts`.
        date: ISO format, local time.
    """

    device: torch.device
    outcomes: Sequence[Outcome]
    card: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.datetime.now().astimezone().isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not self.card:
            object.__setattr__(self, "card", card_facts(self.device))

    @property
    def failed(self) -> list[Outcome]:
        """The outcomes that are not as the bounds say."""
        return [outcome for outcome in self.outcomes if outcome.status == FAIL]

    @property
    def skipped(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == SKIPPED]

    @property
    def seconds(self) -> float:
        """Seconds of all cases, references included."""
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def lines(self) -> list[Line]:
        """One line for each op and kind."""
        groups: dict[tuple[str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.op, outcome.kind), []).append(outcome)
        order = list(dict.fromkeys(op for op, _ in groups))
        return [Line(*key, groups[key]) for key in sorted(groups, key=lambda key: order.index(key[0]))]

    @property
    def verdict(self) -> str:
        """One sentence."""
        passed = len(self.outcomes) - len(self.failed) - len(self.skipped)
        text = f"{passed} of {len(self.outcomes)} cases passed on {self.device} in {self.seconds:.0f} s"
        if self.failed:
            text += f", {len(self.failed)} FAILED"
        return f"{text}, {len(self.skipped)} skipped" if self.skipped else text

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "rcp_kernels": __version__,
            "date": self.date,
            "card": self.card,
            "conditions": conditions(),
            "verdict": self.verdict,
            "cases": [outcome.to_dict() for outcome in self.outcomes],
        }

    def to_markdown(self) -> str:
        """Conditions, the summary table and the failures."""
        facts = self.card | {name: str(value) for name, value in conditions().items()}
        parts = [
            f"# rcp-kernels check: {self.card.get('card', UNKNOWN)}\n",
            f"{self.verdict}. {self.date}, rcp_kernels {__version__}.\n",
            markdown_table(("", ""), list(facts.items())),
            "\nThe error is the largest difference from the reference. The share is that of the bound.\n",
            markdown_table(COLUMNS, [line.cells for line in self.lines]),
        ]
        for title, outcomes in (("Failed", self.failed), ("Skipped", self.skipped)):
            if outcomes:
                parts.append(f"\n{title}:\n")
                parts += [f"- {outcome.op}, {outcome.case}: {outcome.note}" for outcome in outcomes]
        return "\n".join(parts) + "\n"


COLUMNS = ("op", "kind", "cases", "error", "of the bound", "result")
"""The worst error, and its share of the bound."""


def conditions() -> dict[str, Any]:
    """Versions and the CPU, and why the CUDA kernels are missing, if they are."""
    found = hardware.conditions()
    found |= {name: extras.EXTRAS[name].version or "not installed" for name in ("triton", "transformers")}
    return found | {"cuda_kernels": cuda_library.MISSING or "loaded"}


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown. A bar in a cell would end it."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
