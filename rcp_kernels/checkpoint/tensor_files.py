"""The safetensors files of a model, read one tensor at a time by ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..models import hf

__all__ = ["TensorFiles", "remedy"]


class TensorFiles:
    """The safetensors files of a model.

    Attributes:
        names: of the tensors in the files, by their names in the model.
    """

    def __init__(self, files: Iterable[str] | None, model: nn.Module) -> None:
        """Open the files.

        Raises:
            MissingExtra: safetensors is missing.
            ValueError: there are no files, or one is no safetensors file.
        """
        extras.require("safetensors")
        from safetensors import SafetensorError, safe_open

        paths = [Path(file) for file in files or ()]
        if not paths or any(path.suffix != ".safetensors" for path in paths):
            raise ValueError(
                f"from_pretrained: the weights must be safetensors files, got {[path.name for path in paths] or 'none'}"
                f"; pass a directory that rcp-kernels quantize or save_pretrained wrote"
            )
        self._file_of: dict[str, Any] = {}  # by tensor
        for path in paths:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(
                    f"from_pretrained: {path} must be a safetensors file, got {error}; copy it again"
                ) from None
            self._file_of.update(dict.fromkeys(file.keys(), file))
        self.names = hf.file_names(model, self._file_of)

    def check_shapes(self, model: nn.Module) -> None:
        """Refuse float tensors with other shapes than the model's. transformers 5.0 would fill these with random
        numbers.

        Raises:
            ValueError: names the tensor and both shapes.
        """
        for key, tensor in model.state_dict().items():
            if key in self.names:  # transformers merges or splits the other tensors
                stored = self.names[key]
                found = tuple(self._file_of[stored].get_slice(stored).get_shape())
                if found != tuple(tensor.shape):
                    raise ValueError(
                        f"from_pretrained: {key} must have the shape of config.json, {tuple(tensor.shape)}, got {found}"
                        f": a mismatch; {remedy(model)}"
                    )

    def layer(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a packed layer on ``device``, by their names in the layer."""
        prefix = f"{name}."
        found = {key.removeprefix(prefix): stored for key, stored in self.names.items() if key.startswith(prefix)}
        return {key: self._file_of[stored].get_tensor(stored).to(device) for key, stored in found.items()}


def remedy(model: nn.Module) -> str:
    """The remedy for files that do not fit: some families have other layers in other releases of transformers."""
    import transformers

    written: Any = getattr(model.config, "transformers_version", None)
    text = "copy config.json and the weights again"
    if written not in (None, transformers.__version__):
        text += f", or load them with transformers {written}, which wrote them (this is {transformers.__version__})"
    return text
