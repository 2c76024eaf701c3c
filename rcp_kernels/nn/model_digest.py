"""A digest that tells one float model from another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..models.lazy import values_of
from .online_rotation import OnlineRotation

__all__ = ["model_digest"]


def model_digest(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a float model and its rotation.

    The digest covers:

    - the config, which decides at which positions and under which caps the weights run;
    - every parameter's name, dtype, shape and the sum of the bits of each row. An integer sum does not depend on the
      order of summation;
    - every online rotation: its place in the model, its state and its signs.
    """
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    for name in ("_name_or_path", "transformers_version"):  # these depend on who loaded the model, and from where
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        bits = values_of(parameter).view(integers[parameter.element_size()])
        digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, OnlineRotation):
            signs = None if module.signs is None else module.signs.tolist()
            digest.update(f"{name} {module.state().tolist()} {signs}".encode())
    return digest.hexdigest()
