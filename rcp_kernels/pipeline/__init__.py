"""Quantizing, evaluating and running a whole model by name; the command line parses and prints around this.

Quantize a model from Python::

    from rcp_kernels.pipeline import Recipe, quantize

    summary = quantize(Recipe("demo"), "out")
    print(summary)
"""

from .dry_run import DryRun, dry_run
from .evaluate import evaluate
from .generate import generate
from .quantize import quantize
from .recipe import Recipe

__all__ = ["DryRun", "Recipe", "dry_run", "evaluate", "generate", "quantize"]
