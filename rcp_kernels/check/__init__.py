"""Checks a device: every operator against its reference, a small model, and a captured decode step."""

from .cases import Case, Comparison, Outcome, within
from .report import Report
from .run import check_device

__all__ = ["Case", "Comparison", "Outcome", "Report", "check_device", "within"]
