"""What a check is: a case to run on a device, its bound, and its outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Comparison", "Outcome", "Skipped", "bound_of_cast", "exactly", "noise", "run_case", "within"]

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"

# Half a unit in the last place of 1, and half the smallest subnormal number.
_HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_HALF_SMALLEST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


class Skipped(Exception):
    """A case does not apply to the device. The message says why."""


@dataclass(frozen=True)
class Comparison:
    """A result of the device beside the reference.

    Attributes:
        what: the name of the result, such as "y" or "codes".
        error: the largest absolute difference; NaN where the result is not finite.
        ratio: the largest quotient of a difference and its bound. None where the bound is zero: the results must then
            be equal.
        wrong: number of values outside of their bounds.
        count: number of values.
    """

    what: str
    error: float
    ratio: float | None
    wrong: int
    count: int

    def __str__(self) -> str:
        text = f"{self.what}: {self.wrong} of {self.count} values are off, worst error {self.error:.3g}"
        return text if self.ratio is None else f"{text}, {self.ratio:.3g} of the bound"


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: name of the operator, or of the job.
        kind: what the summary groups by, such as "W2A4".
        name: shape, dtype and settings.
        bound: the stated bound, in words.
        run: compares on a device. It raises Skipped where the case does not apply.
    """

    op: str
    kind: str
    name: str
    bound: str
    run: Callable[[torch.device], Iterator[Comparison]]


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        op, kind, case, bound: of the case.
        status: "pass", "fail" or "skipped".
        error: the largest absolute error; None without a comparison.
        ratio: the largest share of a bound; None where every result must be equal.
        note: what is wrong, or why the case was skipped.
        seconds: that the case took, reference included.
    """

    op: str
    kind: str
    case: str
    bound: str
    status: str
    error: float | None
    ratio: float | None
    note: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types. NaN and infinity, which JSON lacks, are text."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def run_case(case: Case, device: torch.device) -> Outcome:
    """Run a case. An exception is a failure, and its first line the note."""
    start = time.perf_counter()
    found: list[Comparison] = []
    status, note = PASS, ""
    try:
        found = list(case.run(device))
        wrong = [comparison for comparison in found if comparison.wrong]
        if wrong:
            status, note = FAIL, "; ".join(map(str, wrong))
        if not found:
            status, note = FAIL, "nothing was compared"
    except Skipped as reason:
        status, note = SKIPPED, str(reason)
    except Exception as error:  # whatever an op raises is an answer of this check
        status, note = FAIL, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    errors = [comparison.error for comparison in found]
    ratios = [comparison.ratio for comparison in found if comparison.ratio is not None]
    seconds = time.perf_counter() - start
    return Outcome(
        *(case.op, case.kind, case.name, case.bound, status),
        max(errors, key=_nan_last) if errors else None,
        max(ratios, key=_nan_last) if ratios else None,
        note,
        seconds,
    )


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def within(what: str, found: Tensor, exact: Tensor, bound: Tensor | float) -> Comparison:
    """Compare a result with a bound for each value.

    Args:
        what: name of the result.
        found: of the device, any shape and dtype.
        exact: of the reference, the same shape.
        bound: 0 or more; broadcasts to exact.
    """
    if found.shape != exact.shape:
        raise ValueError(f"{what} must have shape {tuple(exact.shape)}, got {tuple(found.shape)}")
    values, wanted = found.detach().cpu().double(), exact.detach().cpu().double()
    limit = torch.as_tensor(bound).detach().cpu().double().expand_as(wanted)
    error = (values - wanted).abs()
    # NaN compares false, and so counts as wrong. Equal infinities differ by NaN.
    good = (error <= limit) | (values == wanted)
    wrong = int((~good).sum())
    if not error.numel():
        return Comparison(what, 0.0, None, 0, 0)
    error = torch.where(values == wanted, 0.0, error)
    ratio = None
    if bool((limit > 0).all()):
        ratio = float((error / limit).max())
    return Comparison(what, float(error.max()), ratio, wrong, error.numel())


def exactly(what: str, found: Tensor, expected: Tensor) -> Comparison:
    """Compare a result that must be equal, dtype included."""
    if found.dtype != expected.dtype:
        raise ValueError(f"{what} must have dtype {expected.dtype}, got {found.dtype}")
    return within(what, found, expected, 0.0)


def bound_of_cast(exact: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound of a float64 value after one rounding to dtype."""
    step = _HALF_STEP[dtype]
    return bound * (1 + step) + exact.abs() * step + _HALF_SMALLEST[dtype]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Normal numbers on the CPU, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")


def shape_text(*sizes: int | Sequence[int]) -> str:
    """``48 x 513`` for (48, 513)."""
    flat = [str(size) for entry in sizes for size in (entry if isinstance(entry, Sequence) else (entry,))]
    return " x ".join(flat)
