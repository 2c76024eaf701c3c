"""Layer-wise quantization-aware training with a lookahead loss, weight only: LAQuant (arXiv 2605.08755).

Layer after layer, the weights and the quantizers of layer l are trained to preserve the output of the *next* layer,
which is frozen in floating point. Layer l thus avoids the errors that layer l+1 would amplify. The equations are not
public, and this form of the loss is ours::

    L_l = smooth_l1(F_{l+1}(F_l(h_q; Q(W_l))), F_{l+1}(F_l(h_fp)))        h_q: quantized path, h_fp: floating point path

The loss of the last layer compares the layer's own output. With ``lookahead=0`` the loss of every layer does.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ...formats import PackedWeight
from ...hardware import choose_device
from ...models import Layer, describe
from ...models.lazy import set_source
from ...nn import QuantLinear
from ..layers import (
    Diverged,
    check_calibration_ids,
    device_of,
    first_layer_inputs,
    float_linears,
    on_device,
    placed,
    run_layer,
)
from ..uniform import UniformQuantizer
from .config import LaquantConfig
from .finished_layers import FinishedLayers
from .memory import device_bytes

__all__ = ["LaquantConfig", "LaquantResult", "laquant_quantize_model"]

# Tokens of a stream that go through a layer at once.
_PASS_TOKENS = 2048


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
    device: str | torch.device | None = None,
    device_budget: int | None = None,
) -> LaquantResult:
    """Quantize the decoder layers of a model in place. Each is trained on the outputs of the quantized layers before.

    Two streams of hidden states, of the quantized and of the floating point path, are kept in memory up to a budget,
    and in temporary files above it.

    Args:
        model: a float language model that :func:`rcp_kernels.models.describe` knows, without online rotations.
        calibration_ids: int64 [sequences, tokens], on any device.
        config: LaquantConfig() if None.
        directory: keeps finished layers. A call with the same arguments continues after the last finished layer and
            gives the same bits. None keeps nothing.
        memory_budget: GiB for the two streams.
        progress: called with (layer, step, loss) after each step.
        device: where the layers run. None for the device of the model. A model on the CPU may be larger than it: the
            trained layer and the next one lie on the device.
        device_budget: bytes on that device for the two streams. Streams that do not fit stay beside the model. None
            for the memory that torch counts as free, less the need of the layers. The results do not depend on it.

    Returns:
        The packed weights, on the device of the model, and the losses. The model's QuantLinear layers hold the weights
        as well.

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
    finished = None if directory is None else FinishedLayers(Path(directory), model, calibration_ids, config)
    layers = [model.get_submodule(layer.name) for layer in architecture.layers]
    home = device_of(model)
    device = home if device is None else choose_device(device)
    hidden, keywords = first_layer_inputs(model, calibration_ids, device)
    if device != home:
        needed = device_bytes(architecture, config, hidden.shape[1])
        hidden, _ = on_device(hidden, device, device_budget, needed, copies=2)
    streams = _Streams(hidden, memory_budget, device)
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
            del training  # its gradients would lie beside the next layer
            if finished is not None:
                finished.save(index, *trained)
        weights, losses = trained
        weights = {name: packed.to(home) for name, packed in weights.items()}
        for name, packed in weights.items():
            _set_weight(model.get_parameter(f"{name}.weight"), packed)
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


def _set_weight(parameter: nn.Parameter, packed: PackedWeight) -> None:
    """Give a parameter the values of a packed weight; if it is read from a source, another source."""
    if parameter.is_meta:
        set_source(parameter, lambda device: packed.dequantize().to(device, parameter.dtype))
    else:
        parameter.data.copy_(packed.dequantize())


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
        self.weights: dict[str, nn.Parameter] = {}
        self.quantizers: dict[str, UniformQuantizer] = {}
        with placed(layer, streams.device):
            with self._autocast():
                squares = _input_squares(layer, names, keywords, streams)
            for name, square in squares.items():
                weight = layer.get_parameter(f"{name}.weight").detach()
                self.weights[name] = nn.Parameter(weight.to(torch.float32, copy=True))
                quantizer = UniformQuantizer(weight.shape, config.bits, config.group_size, device=weight.device)
                quantizer.init_clip_search(weight, square)
                self.quantizers[name] = quantizer

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Put this layer and the next one on the device, but not the weights that the trained ones replace."""
        replaced = {id(self.layer.get_parameter(f"{name}.weight")) for name in self.weights}
        with contextlib.ExitStack() as stack:
            stack.enter_context(placed(self.layer, self.streams.device, skip=replaced))
            if self.following is not None:
                stack.enter_context(placed(self.following[0], self.streams.device))
            yield

    def run(
        self, progress: Callable[[int, int, float], None] | None
    ) -> tuple[dict[str, PackedWeight], dict[str, float]]:
        """Train the layer. Returns its packed weights by full name, and its losses as in `LaquantResult`."""
        with self._on_device():
            before = self._mean_loss()
            self._train(progress)
            after = self._mean_loss()
        packed = {f"{self.names.name}.{name}": self.quantizers[name].export(w) for name, w in self.weights.items()}
        return packed, {"layer": self.index, "before": before, "after": after}

    def _train(self, progress: Callable[[int, int, float], None] | None) -> None:
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
        step = 0
        for _ in range(config.epochs):
            for batch in _batches(self.streams.sequences, config.batch_size, generator):
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(batch, self._quantized())
                value = loss.item()
                if not math.isfinite(value):
                    raise Diverged(
                        f"laquant: the loss of {self.names.name} must be finite, got {value} at step {step}; lower "
                        f"lr_weights ({config.lr_weights}) or lr_quantizer ({config.lr_quantizer})"
                    )
                loss.backward()
                optimizer.step()
                rates.step()
                step += 1
                if progress is not None:
                    progress(self.index, step, value)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.streams.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _quantized(self) -> dict[str, Tensor]:
        return {f"{name}.weight": self.quantizers[name](weight, self.dtype) for name, weight in self.weights.items()}

    def _loss(self, batch: Tensor, weights: dict[str, Tensor]) -> Tensor:
        def layer(hidden: Tensor, **keywords: Any) -> Any:
            return functional_call(self.layer, weights, (hidden,), keywords)

        with self._autocast():
            out = run_layer(layer, self.streams.quantized[batch].to(self.streams.device), self.keywords)
            if self.following is not None:
                out = run_layer(self.following[0], out, self.following[1])
        return F.smooth_l1_loss(out.float(), self.streams.exact[batch].to(self.streams.device).float())

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
            run_layer(layer, part.to(streams.device), keywords)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] for name in linears}


def _batches(count: int, size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from order.split(size)


class _Streams:
    """The hidden states before a layer on both paths: [sequences, tokens, hidden] each, in memory or in files.

    ``device`` is where the layers run. The streams may lie elsewhere.
    """

    def __init__(self, hidden: Tensor, memory_budget: float, device: torch.device) -> None:
        self.device = device
        self.sequences = hidden.shape[0]
        self._file = None
        if hidden.device.type != "cpu" or 2 * hidden.nbytes <= memory_budget * 2**30:
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
        with placed(layer, self.device):
            for part in self.parts(stream):
                part.copy_(run_layer(layer, part.to(self.device), keywords))

    @staticmethod
    def parts(stream: Tensor) -> tuple[Tensor, ...]:
        """Views of a stream with some sequences each."""
        return stream.split(max(1, _PASS_TOKENS // stream.shape[1]))
