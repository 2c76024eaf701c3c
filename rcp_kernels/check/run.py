"""Runs every case on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .cases import Case, Outcome, run_case
from .linear import linear_cases
from .model import model_cases
from .other_ops import activation_cases, cache_cases, search_cases, walsh_cases
from .report import Report

__all__ = ["all_cases", "check_device"]

Progress = Callable[[str, int, int, str], None]
"""(phase, done, total, text)"""


def all_cases() -> list[Case]:
    """Every case, operators first."""
    parts: tuple[Iterable[Case], ...] = (
        *(linear_cases(), activation_cases(), walsh_cases(), cache_cases(), search_cases()),
        model_cases(),
    )
    return [case for part in parts for case in part]


def check_device(
    device: str | torch.device, progress: Progress | None = None, cases: Sequence[Case] | None = None
) -> Report:
    """Compare every operator, and a small model, on a device with the references.

    The references run on the CPU, in float64 or exact integers. Every case has a stated bound. Two runs must give equal
    bits.

    Args:
        device: any torch device.
        progress: called after each case with the phase "check", the cases done, their number, and the operator.
        cases: to run; None for all.

    Returns:
        The outcomes. ``report.failed`` lists the failures.
    """
    device = torch.device(device)
    cases = all_cases() if cases is None else cases
    outcomes: list[Outcome] = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress("check", done, len(cases), case.op)
        outcomes.append(run_case(case, device))
    if progress is not None:
        progress("check", len(cases), len(cases), "")
    return Report(device, outcomes)
