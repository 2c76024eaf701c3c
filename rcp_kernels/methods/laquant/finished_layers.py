"""The finished layers of a training in a directory, from which a later call continues."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ...formats import PackedWeight
from ...nn.model_digest import model_digest
from ..files import write_atomic
from .config import LaquantConfig

__all__ = ["FinishedLayers"]

# Version of the training's arithmetic. A run must not mix layers of two versions.
_VERSION = 1


class FinishedLayers:
    """A directory with a safetensors file for each finished layer, and the settings of their run."""

    def __init__(self, directory: Path, model: nn.Module, ids: Tensor, config: LaquantConfig) -> None:
        self.directory = directory
        record = {
            "version": _VERSION,
            **asdict(config),
            "model": model_digest(model),
            "calibration": [*ids.shape, int((ids.cpu() * torch.arange(1, ids.numel() + 1).view(ids.shape)).sum())],
        }
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "run.json"
        if not path.exists():
            write_atomic(path, json.dumps(record, indent=1).encode())
            return
        try:
            stored = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(
                f"laquant: {path} must be the record of a run, got a damaged file; delete the directory to start over"
            ) from None
        if stored != record:
            keys = [key for key in record if stored.get(key) != record[key]]
            raise ValueError(
                f"laquant: directory must hold a run of the same arguments, got another {', '.join(keys)} in {path}; "
                f"pass an empty directory"
            )

    def _path(self, index: int) -> Path:
        return self.directory / f"layer_{index:03d}.safetensors"

    def save(self, index: int, weights: dict[str, PackedWeight], losses: dict[str, float]) -> None:
        from safetensors.torch import save

        tensors = {
            key: value for name, weight in weights.items() for key, value in weight.state_dict(name + ".").items()
        }
        metadata = {"losses": json.dumps(losses), "linears": json.dumps(list(weights))}
        write_atomic(self._path(index), save(tensors, metadata))

    def load(self, index: int) -> tuple[dict[str, PackedWeight], dict[str, float]] | None:
        from safetensors import SafetensorError, safe_open

        if not self._path(index).exists():
            return None
        try:
            with safe_open(self._path(index), framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"laquant: {self._path(index)} must be a complete safetensors file, got {error}; delete it to train "
                f"this layer again"
            ) from None
        names = json.loads(metadata["linears"])
        weights = {name: PackedWeight.from_state_dict(tensors, name + ".") for name in names}
        return weights, json.loads(metadata["losses"])
