"""Layer-wise quantization-aware training with a lookahead loss, weight only: LAQuant (arXiv 2605.08755).

Layer after layer, the weights and the quantizers of layer l are trained to preserve the output of the *next* layer,
which is frozen in floating point. Layer l thus avoids the errors that layer l+1 would amplify. The equations are not
public, and this form of the loss is ours::

    L_l = smooth_l1(F_{l+1}(F_l(h_q; Q(W_l))), F_{l+1}(F_l(h_fp)))        h_q: quantized path, h_fp: floating point path

The loss of the last layer compares the layer's own output. With ``lookahead=0`` the loss of every layer does.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ...formats import PackedWeight
from ...models import Layer, describe
from ...nn import QuantLinear
from ...nn.model_digest import model_digest
from ...ops.checks import check_int, check_one_of
from ..files import write_atomic
from ..layers import Diverged, check_calibration_ids, first_layer_inputs, float_linears, run_layer
from ..uniform import UniformQuantizer

__all__ = ["LaquantConfig", "LaquantResult", "laquant_quantize_model"]

# Tokens of a stream that go through a layer at once.
_PASS_TOKENS = 2048


@dataclass(frozen=True)
class LaquantConfig:
    """The settings of a training.

    Attributes:
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or the input features of a layer.
        lookahead: 1 for the loss behind the next layer, 0 for the layer's own output.
        epochs: passes over the calibration text per layer.
        batch_size: sequences per step.
        lr_weights, lr_quantizer: learning rates of AdamW (betas 0.9 and 0.95, no decay). They fall to zero along a
            cosine.
        dtype: dtype that the layers compute in during training. bfloat16 takes a quarter of the time on CPUs with
            AVX512-BF16 or AMX. Weights, quantizers and streams are float32 in both cases.
        seed: of the order of the sequences.
        act_bits: of the resulting QuantLinear layers; 16 for weight only.
    """

    bits: int = 3
    group_size: int = 128
    lookahead: int = 1
    epochs: int = 2
    batch_size: int = 4
    lr_weights: float = 1e-5
    lr_quantizer: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    act_bits: int = 16

    def __post_init__(self) -> None:
        where = "LaquantConfig"
        check_one_of(where, "lookahead", self.lookahead, (0, 1), "1 looks one layer ahead")
        check_int(where, "epochs", self.epochs, 1, "2 are usual")
        check_int(where, "batch_size", self.batch_size, 1, "4 sequences are usual")
        check_one_of(where, "dtype", self.dtype, ("float32", "bfloat16"))


@dataclass
class LaquantResult:
    """The packed weights and the losses.

    Attributes:
        weights: by the full name of each linear layer.
        losses: a dict for each decoder layer with its number ``layer``, and ``before`` and ``after``, the mean losses
            over the calibration text with the initial and with the trained quantizers.
    """

    weights: dict[str, PackedWeight] = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)


def laquant_quantize_model(
    model: nn.Module,
    calibration_ids: Tensor,
    config: LaquantConfig | None = None,
    *,
    directory: str | Path | None = None,
    memory_budget: float = 4.0,
    progress: Callable[[int, int, float], None] | None = None,
) -> LaquantResult:
    """Quantize the decoder layers of a model in place. Each is trained on the outputs of the quantized layers before.

    Two streams of hidden states, of the quantized and of the floating point path, are kept in memory up to a budget,
    and in temporary files above it.

    Args:
        model: a float language model that :func:`rcp_kernels.models.describe` knows, without online rotations.
        calibration_ids: int64 [sequences, tokens].
        config: LaquantConfig() if None.
        directory: keeps finished layers. A call with the same arguments continues after the last finished layer and
            gives the same bits. None keeps nothing.
        memory_budget: GiB for the two streams.
        progress: called with (layer, step, loss) after each step.

    Returns:
        The packed weights, which the model's QuantLinear layers hold as well, and the losses.

    Raises:
        ValueError: calibration_ids has another shape or no full sequence, directory holds a run of another config,
            model or text, or the model is unknown.
        Diverged: a loss is not finite. The message names the layer. The directory keeps the layers before it. The
            model then holds their quantized weights: load it again before another try.
    """
    config = LaquantConfig() if config is None else config
    check_calibration_ids(calibration_ids, "laquant")
    architecture = describe(model)
    float_linears(model, architecture, "laquant")
    result, was_training = LaquantResult(), model.training
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    finished = None if directory is None else _FinishedLayers(Path(directory), model, calibration_ids, config)
    layers = [model.get_submodule(layer.name) for layer in architecture.layers]
    hidden, keywords = first_layer_inputs(model, calibration_ids)
    streams = _Streams(hidden, memory_budget)
    del hidden  # the streams may be in files because memory is short
    exact_layers = 0
    for index, names in enumerate(architecture.layers):
        last = min(index + config.lookahead, len(layers) - 1)
        # The floating point stream runs ahead: the loss compares with its output of layer ``last``, and the layers that
        # it passes are not quantized yet.
        for ahead in range(exact_layers, last + 1):
            streams.advance(streams.exact, layers[ahead], keywords[ahead])
        exact_layers = last + 1
        trained = None if finished is None else finished.load(index)
        if trained is None:
            following = (layers[last], keywords[last]) if last > index else None
            training = _LayerTraining(layers[index], names, index, keywords[index], following, streams, config)
            trained = training.run(progress)
            if finished is not None:
                finished.save(index, *trained)
        weights, losses = trained
        for name, packed in weights.items():
            model.get_parameter(f"{name}.weight").data.copy_(packed.dequantize())
        streams.advance(streams.quantized, layers[index], keywords[index])
        result.weights.update(weights)
        result.losses.append(losses)
    for name, packed in result.weights.items():
        bias = dict(model.get_submodule(name).named_parameters()).get("bias")
        model.set_submodule(name, QuantLinear.from_packed(packed, bias, config.act_bits))
    for parameter in learned:
        parameter.requires_grad_(True)
    model.train(was_training)
    return result


class _LayerTraining:
    """The training of one decoder layer."""

    def __init__(
        self,
        layer: nn.Module,
        names: Layer,
        index: int,
        keywords: dict[str, Any],
        following: tuple[nn.Module, dict[str, Any]] | None,
        streams: _Streams,
        config: LaquantConfig,
    ) -> None:
        self.layer, self.names, self.index, self.keywords = layer, names, index, keywords
        self.following = following
        self.streams = streams
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        with self._autocast():
            squares = _input_squares(layer, names, keywords, streams)
        self.weights: dict[str, nn.Parameter] = {}
        self.quantizers: dict[str, UniformQuantizer] = {}
        for name, square in squares.items():
            weight = layer.get_parameter(f"{name}.weight").detach()
            self.weights[name] = nn.Parameter(weight.to(torch.float32, copy=True))
            quantizer = UniformQuantizer(weight.shape, config.bits, config.group_size, device=weight.device)
            quantizer.init_clip_search(weight, square)
            self.quantizers[name] = quantizer

    def run(
        self, progress: Callable[[int, int, float], None] | None
    ) -> tuple[dict[str, PackedWeight], dict[str, float]]:
        """Train the layer. Returns its packed weights by full name, and its losses as in `LaquantResult`."""
        config = self.config
        steps = config.epochs * math.ceil(self.streams.sequences / config.batch_size)
        quantizer_parameters = [p for quantizer in self.quantizers.values() for p in quantizer.parameters()]
        optimizer = torch.optim.AdamW(
            [
                {"params": list(self.weights.values()), "lr": config.lr_weights},
                {"params": quantizer_parameters, "lr": config.lr_quantizer},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
        # Every layer has its own generator: a run that resumes at this layer draws the same batches.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.index)
        before, step = self._mean_loss(), 0
        for _ in range(config.epochs):
            for batch in _batches(self.streams.sequences, config.batch_size, generator):
                loss = self._loss(batch, self._quantized())
                value = loss.item()
                if not math.isfinite(value):
                    raise Diverged(
                        f"laquant: the loss of {self.names.name} must be finite, got {value} at step {step}; lower "
                        f"lr_weights ({config.lr_weights}) or lr_quantizer ({config.lr_quantizer})"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                rates.step()
                step += 1
                if progress is not None:
                    progress(self.index, step, value)
        packed = {f"{self.names.name}.{name}": self.quantizers[name].export(w) for name, w in self.weights.items()}
        return packed, {"layer": self.index, "before": before, "after": self._mean_loss()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.streams.exact.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _quantized(self) -> dict[str, Tensor]:
        return {f"{name}.weight": self.quantizers[name](weight, self.dtype) for name, weight in self.weights.items()}

    def _loss(self, batch: Tensor, weights: dict[str, Tensor]) -> Tensor:
        def layer(hidden: Tensor, **keywords: Any) -> Any:
            return functional_call(self.layer, weights, (hidden,), keywords)

        with self._autocast():
            out = run_layer(layer, self.streams.quantized[batch], self.keywords)
            if self.following is not None:
                out = run_layer(self.following[0], out, self.following[1])
        return F.smooth_l1_loss(out.float(), self.streams.exact[batch].float())

    @torch.no_grad()
    def _mean_loss(self) -> float:
        weights = self._quantized()
        batches = _batches(self.streams.sequences, self.config.batch_size)
        parts = [(len(batch), self._loss(batch, weights).item()) for batch in batches]
        return sum(count * loss for count, loss in parts) / self.streams.sequences


@torch.no_grad()
def _input_squares(layer: nn.Module, names: Layer, keywords: dict[str, Any], streams: _Streams) -> dict[str, Tensor]:
    """For each linear layer, by its name in the layer: the sum of squared inputs over the calibration text.

    Returns:
        float32 [in_features] each, in the order of ``names.linears``.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            square = args[0].to(torch.float32).square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + square if name in sums else square

        return hook

    linears = [full.removeprefix(names.name + ".") for full in names.linears]
    handles = [layer.get_submodule(name).register_forward_pre_hook(add(name)) for name in linears]
    try:
        for part in streams.parts(streams.quantized):
            run_layer(layer, part, keywords)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] for name in linears}


def _batches(count: int, size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from order.split(size)


class _Streams:
    """The hidden states before a layer on both paths: [sequences, tokens, hidden] each, in memory or in files."""

    def __init__(self, hidden: Tensor, memory_budget: float) -> None:
        self.sequences = hidden.shape[0]
        self._file = None
        if 2 * hidden.numel() * hidden.element_size() <= memory_budget * 2**30:
            self.quantized, self.exact = hidden, hidden.clone()
            return
        self._file = tempfile.TemporaryDirectory(prefix="rcp_kernels_laquant_")
        both = []
        for name in ("quantized", "exact"):
            path = str(Path(self._file.name) / name)
            # Writing to a mapped file on a full disk kills the process. Allocating the blocks first raises OSError.
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, hidden.numel() * hidden.element_size())
            stream = torch.from_file(path, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
            both.append(stream.copy_(hidden))
        self.quantized, self.exact = both

    @torch.no_grad()
    def advance(self, stream: Tensor, layer: nn.Module, keywords: dict[str, Any]) -> None:
        """Replace a stream by the layer's output."""
        for part in self.parts(stream):
            part.copy_(run_layer(layer, part, keywords))

    @staticmethod
    def parts(stream: Tensor) -> tuple[Tensor, ...]:
        """Views of a stream with some sequences each."""
        return stream.split(max(1, _PASS_TOKENS // stream.shape[1]))


# Version of the training's arithmetic. A run must not mix layers of two versions.
_VERSION = 1


class _FinishedLayers:
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
