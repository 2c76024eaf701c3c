"""What a model is made of: module names by ``config.model_type``, as data. One entry a family, in `families`."""

from .architecture import Architecture, Layer, describe
from .families import FAMILIES, Family

__all__ = ["FAMILIES", "Architecture", "Family", "Layer", "describe"]
