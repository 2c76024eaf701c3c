"""RCP: training of a low-bit student on its float teacher (arXiv 2502.15779). docs/rcp.md explains it."""

from ..layers import Diverged
from .config import PRESETS, RcpConfig, TrainResult
from .distillation import student_perplexity
from .train import load_trained, train

__all__ = [
    "PRESETS",
    "Diverged",
    "RcpConfig",
    "TrainResult",
    "load_trained",
    "student_perplexity",
    "train",
]
