"""RCP: training of a low-bit student on its float teacher (arXiv 2502.15779). docs/rcp.md explains it."""

from .train import (
    PRESETS,
    Diverged,
    RcpConfig,
    TrainResult,
    load_trained,
    student_perplexity,
    train,
)

__all__ = [
    "PRESETS",
    "Diverged",
    "RcpConfig",
    "TrainResult",
    "load_trained",
    "student_perplexity",
    "train",
]
