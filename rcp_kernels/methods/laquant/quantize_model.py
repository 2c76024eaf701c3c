"""Layer-wise quantization-aware training with a lookahead loss, weight only: LAQuant (arXiv 2605.08755).

Layer after layer, the weights and the quantizer of layer l are trained so that the output of the *next* layer, frozen
in floating point, stays what it was; the error that layer l+1 would amplify is thus the error that layer l avoids. The
form is ours, since the equations are not public::

    L_l = smooth_l1(F_{l+1}(F_l(h_q; Q(W_l))), F_{l+1}(F_l(h_fp)))        h_q: quantized path, h_fp: floating point path

and the last layer is held against its own output. ``lookahead=0`` is the plain layer-wise loss, after every layer.
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

from ...atomic import write_atomic
from ...formats import PackedWeight
from ...models import Layer, describe
from ...nn import QuantLinear
from ...nn.model_digest import model_digest
from ..layers import Diverged, check_calibration_ids, first_layer_inputs, float_linears, run_layer
from ..uniform import UniformQuantizer

__all__ = ["LaquantConfig", "LaquantResult", "laquant_quantize_model"]

# Of a stream that go through a layer at once.
_PASS_TOKENS = 2048


@dataclass(frozen=True)
class LaquantConfig:
    """What is trained and how.

    Attributes:
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or the input features of a layer.
        lookahead: 1 for the loss behind the next layer, 0 for the layer's own output.
        epochs: passes over the calibration text, a layer.
        batch_size: sequences a step.
        lr_weights, lr_quantizer: of AdamW (betas 0.9 and 0.95, no decay), falling to zero along a cosine.
        dtype: that the layers compute in while they are trained; bfloat16 takes a quarter of the time on CPUs with
            AVX512-BF16 or AMX. Weights, quantizers and streams are float32 all the same.
        seed: of the order of the sequences.
        act_bits: of the QuantLinear layers made; 16 for weight only.
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
        if self.lookahead not in (0, 1):
            raise ValueError(
                f"LaquantConfig: lookahead must be 0 (the layer's own output) or 1 (behind the next layer), got "
                f"{self.lookahead}; the published method looks one layer ahead"
            )
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LaquantConfig: {name} must be at least 1, got {getattr(self, name)}; 2 epochs of batches of 4 "
                    f"are usual"
                )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"LaquantConfig: dtype must be float32 or bfloat16, got {self.dtype!r}; pass one of them")


@dataclass
class LaquantResult:
    """The packed weights and how each layer's loss went.

    Attributes:
        weights: by the full name of each linear layer.
        losses: a dict a layer: ``layer``, ``before`` and ``after``, the mean loss over the calibration text with the
            quantizer as initialised and as trained.
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
    """Quantize the decoder layers of a model in place, each trained on what the layers before it really give.

    Two streams of hidden states go along, the quantized path's and the floating point path's: they are kept in memory
    up to the budget, and in temporary files above it.

    Args:
        model: a float language model that :func:`rcp_kernels.models.describe` knows, without online rotations.
        calibration_ids: int64 [sequences, tokens].
        config: LaquantConfig() if None.
        directory: where a finished layer is kept, so that a call with the same arguments goes on after the last one, to
            the same bits. None keeps nothing.
        memory_budget: GiB for the two streams.
        progress: called with (layer, step, loss) after each step.

    Returns:
        The packed weights, which the model's QuantLinear layers hold as well, and the losses.

    Raises:
        ValueError: calibration_ids has another shape or no full sequence, directory holds a run of another config,
            model or text, or the model is unknown.
        Diverged: a loss is not finite; names the layer, and the layers before it are kept. The model then holds
            their quantized weights: load it anew before another try.
    """
    config = LaquantConfig() if config is None else config
    check_calibration_ids(calibration_ids, "laquant")
    architecture = describe(model)
    float_linears(model, architecture, "laquant")
    result, was_training = LaquantResult(), model.training
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    store = None if directory is None else _Store(Path(directory), model, calibration_ids, config)
    layers = [model.get_submodule(layer.name) for layer in architecture.layers]
    hidden, keywords = first_layer_inputs(model, calibration_ids)
    streams = _Streams(hidden, memory_budget)
    # Or it would stay in memory to the end, beside streams that are in files for want of memory.
    del hidden
    exact_layers = 0
    for index, names in enumerate(architecture.layers):
        last = min(index + config.lookahead, len(layers) - 1)
        # The floating point stream goes ahead of the other one: it holds what the loss compares with. The layers that
        # it goes through are not quantized yet.
        for ahead in range(exact_layers, last + 1):
            streams.advance(streams.exact, layers[ahead], keywords[ahead])
        exact_layers = last + 1
        done = None if store is None else store.load(index)
        if done is None:
            following = (layers[last], keywords[last]) if last > index else None
            done = _train_layer(layers[index], names, index, keywords[index], following, streams, config, progress)
            if store is not None:
                store.save(index, *done)
        weights, losses = done
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


def _train_layer(
    layer: nn.Module,
    names: Layer,
    index: int,
    keywords: dict[str, Any],
    following: tuple[nn.Module, dict[str, Any]] | None,
    streams: _Streams,
    config: LaquantConfig,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[dict[str, PackedWeight], dict[str, float]]:
    weights: dict[str, nn.Parameter] = {}
    quantizers: dict[str, UniformQuantizer] = {}
    dtype = getattr(torch, config.dtype)
    computes_in = torch.autocast(streams.exact.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with computes_in:
        inputs = _input_squares(layer, names, keywords, streams)
    for full in names.linears:
        name = full.removeprefix(names.name + ".")
        weight = layer.get_parameter(f"{name}.weight").detach()
        weights[name] = nn.Parameter(weight.to(torch.float32, copy=True))
        quantizers[name] = UniformQuantizer(weight.shape, config.bits, config.group_size, device=weight.device)
        quantizers[name].init_clip_search(weight, inputs[name])

    def rounded() -> dict[str, Tensor]:
        return {f"{name}.weight": quantizers[name](weight, dtype) for name, weight in weights.items()}

    def loss_of(batch: Tensor, values: dict[str, Tensor]) -> Tensor:
        def quantized(hidden: Tensor, **keywords: Any) -> Any:
            return functional_call(layer, values, (hidden,), keywords)

        with computes_in:
            out = run_layer(quantized, streams.quantized[batch], keywords)
            if following is not None:
                out = run_layer(following[0], out, following[1])
        return F.smooth_l1_loss(out.float(), streams.exact[batch].float())

    def mean_loss() -> float:
        with torch.no_grad():
            values = rounded()
            batches = _batches(streams.sequences, config.batch_size)
            parts = [(len(batch), loss_of(batch, values).item()) for batch in batches]
        return sum(count * loss for count, loss in parts) / streams.sequences

    steps = config.epochs * math.ceil(streams.sequences / config.batch_size)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(weights.values()), "lr": config.lr_weights},
            {"params": [p for q in quantizers.values() for p in q.parameters()], "lr": config.lr_quantizer},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    # A generator a layer: a run that is resumed at this layer sees the same batches as one that came all the way.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    before, step = mean_loss(), 0
    for _ in range(config.epochs):
        for batch in _batches(streams.sequences, config.batch_size, generator):
            loss = loss_of(batch, rounded())
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(
                    f"laquant: the loss of {names.name} must be finite, got {value} at step {step}; lower "
                    f"lr_weights ({config.lr_weights}) or lr_quantizer ({config.lr_quantizer})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if progress is not None:
                progress(index, step, value)
    packed = {f"{names.name}.{name}": quantizers[name].export(weight) for name, weight in weights.items()}
    return packed, {"layer": index, "before": before, "after": mean_loss()}


@torch.no_grad()
def _input_squares(layer: nn.Module, names: Layer, keywords: dict[str, Any], streams: _Streams) -> dict[str, Tensor]:
    """Of each linear layer the sum of its inputs' squares over the calibration text, float32 [in_features]."""
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
    return sums


def _batches(count: int, size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from order.split(size)


class _Streams:
    """The hidden states before a layer, of both paths: [sequences, tokens, hidden] each, in memory or in a file."""

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
            # A mapped file that finds the disk full kills the process: its blocks are taken first, or refused by name.
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, hidden.numel() * hidden.element_size())
            stream = torch.from_file(path, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
            both.append(stream.copy_(hidden))
        self.quantized, self.exact = both

    @torch.no_grad()
    def advance(self, stream: Tensor, layer: nn.Module, keywords: dict[str, Any]) -> None:
        """Replace a stream by the layer's output, some sequences at a time."""
        for part in self.parts(stream):
            part.copy_(run_layer(layer, part, keywords))

    @staticmethod
    def parts(stream: Tensor) -> tuple[Tensor, ...]:
        """The stream, some sequences at a time."""
        return stream.split(max(1, _PASS_TOKENS // stream.shape[1]))


# Of what a layer's training computes: layers of two versions are not mixed.
_VERSION = 1


class _Store:
    """A directory with one safetensors file a finished layer, and a record of the run that it belongs to."""

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
                f"laquant: {path} must be the record of a run, got a damaged file; delete the directory to start anew"
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
                f"laquant: {self._path(index)} must be a whole safetensors file, got {error}; delete it to train this "
                f"layer again"
            ) from None
        names = json.loads(metadata["linears"])
        weights = {name: PackedWeight.from_state_dict(tensors, name + ".") for name in names}
        return weights, json.loads(metadata["losses"])
