"""The module names of models by ``config.model_type``, one entry per family, and the loading of models."""

from .architecture import Architecture, Layer, describe
from .families import FAMILIES, Family

__all__ = ["FAMILIES", "Architecture", "Family", "Layer", "describe"]
