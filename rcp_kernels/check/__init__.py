"""Checks a device: every operator against its reference, a small model, and a captured decode step."""

from .cases import Outcome
from .report import Report
from .run import check_device

__all__ = ["Outcome", "Report", "check_device"]
