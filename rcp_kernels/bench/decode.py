"""Greedy decoding of a whole model at batch 1: packed layers against torch in bfloat16, token by token.

The model is the demo's, quantized, or a LLaMA of published sizes with random weights: speed does not depend on values.
A random model is built in packed form, so its layers never exist in float. Both models decode eagerly with a growing
cache. On request both also decode compiled, with transformers' static cache.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras, hardware
from ..evaluation.decoding import Decoder
from ..models.hf import tensor_state
from ..models.load import load_float
from ..nn.quant_linear import QuantLinear
from ..nn.quantize_model import quantize_model
from .lut_linear import group_size_for, random_packed_weight
from .timing import CPU

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {},
    "llama-2-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama-3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Arguments of LlamaConfig, whose defaults are the sizes of LLaMA-2-7B."""
DEMO = "demo"

OURS, TORCH = "rcp_kernels", "torch bf16"
EAGER, EAGER_STATIC, COMPILED = "eager, growing cache", "eager, static cache", "compiled, static cache"

# Timed steps of a turn. The step before them finds its caches cold and is not timed.
_TURN = 8
_COMPILING_STEPS = 3
_SLACK_BYTES = 1 << 30

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu is the process's own time, which other processes disturb less. It means something for one thread only."""


@dataclass
class Result:
    """Median seconds per token of each competitor, the sizes of both models, and the conditions.

    Attributes:
        context: tokens in the cache before the first step.
        new_tokens: timed steps of each competitor.
        interleaved: whether all competitors took turns. Otherwise memory did not hold both models.
        packed_bytes, fp16_bytes: bytes of the tensors on disk, embedding, head and norms in 16 bits.
        clock: a key of CLOCKS.
    """

    model: str
    layers: int
    bits: int
    act_bits: int
    group_size: int
    context: int
    new_tokens: int
    threads: int
    interleaved: bool
    conditions: dict[str, Any]
    packed_bytes: int
    fp16_bytes: int
    clock: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        """torch's fastest way to decode over our fastest."""
        ours, reference = (
            min(seconds for name, seconds in self.seconds.items() if name.startswith(model)) for model in (OURS, TORCH)
        )
        return reference / ours

    @property
    def times_smaller(self) -> float:
        return self.fp16_bytes / self.packed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types, ratios included."""
        return asdict(self) | {"speedup": self.speedup, "times_smaller": self.times_smaller}


# More than 60 lines: the signature, the docstring and the result name every condition.
def measure(
    model: str,
    *,
    layers: int | None = None,
    bits: int = 2,
    act_bits: int = 4,
    group_size: int = 128,
    context: int = 128,
    new_tokens: int = 16,
    compiled: bool = False,
    clock: str = "wall",
    save: Path | None = None,
    device: torch.device = CPU,
    log: Callable[[str], None] = print,
) -> Result:
    """Build the packed and the bfloat16 model, and decode with both in turn after `context` random tokens.

    Where memory does not hold both random models, they are built, measured and freed one after the other.

    Args:
        model: a key of SHAPES, or "demo".
        layers: of a random model; the default is all.
        group_size: 32, 64 or 128, halved where it does not divide in_features.
        new_tokens: rounded up to turns of 8.
        compiled: also decode with torch.compile. Compiling takes minutes.
        clock: a key of CLOCKS.
        save: a folder for the packed tensors, as model.safetensors.
        device: to decode on. The models are built on the CPU.
        log: takes progress lines.

    Raises:
        ValueError: unknown model; layers, context or new_tokens below 1; layers with the demo's model.
        MemoryError: memory does not hold the bfloat16 model.
        MissingExtra: transformers is missing, or safetensors where `save` is given.
    """
    if model not in (*SHAPES, DEMO):
        raise ValueError(f"unknown model {model!r}; one of: {', '.join((*SHAPES, DEMO))}")
    if min(context, new_tokens, 1 if layers is None else layers) < 1:
        raise ValueError(f"layers, context and new_tokens must be at least 1, got {layers}, {context}, {new_tokens}")
    if model == DEMO and layers is not None:
        raise ValueError(f"layers must be left out for the demo's model, got {layers}")
    extras.require("transformers", *(["safetensors"] if save else []))
    if model == DEMO:
        builders, group_size = _demo_builders(bits, group_size, act_bits)
        interleaved = True
    else:
        shape = SHAPES[model] | ({} if layers is None else {"num_hidden_layers": layers})
        interleaved = _fits_together(shape, bits, device)
        builders = random_builders(shape, bits, group_size, act_bits)

    prompt = torch.randint(0, 32, (1, context))
    models: dict[str, nn.Module] = {}
    nbytes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name, build in builders.items():
        log(f"building {name}, W{bits}A{act_bits}" if name == OURS else f"building {name}")
        models[name] = built = build().to(device)
        tensors = tensor_state(built)
        nbytes[name] = sum(tensor.nbytes for tensor in tensors.values())
        if save is not None and name == OURS:
            log(f"writing {nbytes[name] / 1e9:.2f} GB to {save}")
            _write_safetensors(tensors, save)
        config: Any = built.config
        if not interleaved:
            seconds |= decode_seconds(models, prompt, new_tokens, compiled=compiled, clock=clock, log=log)
            models.clear()
            del built, tensors
    if interleaved:
        seconds = decode_seconds(models, prompt, new_tokens, compiled=compiled, clock=clock, log=log)
    return Result(
        model=model,
        layers=config.num_hidden_layers,
        bits=bits,
        act_bits=act_bits,
        group_size=group_size,
        context=context,
        new_tokens=_turns(new_tokens) * _TURN,
        threads=torch.get_num_threads(),
        interleaved=interleaved,
        conditions=hardware.conditions(device),
        packed_bytes=nbytes[OURS],
        fp16_bytes=nbytes[TORCH],
        clock=clock,
        seconds=seconds,
    )


def decode_seconds(
    models: Mapping[str, nn.Module],
    prompt: Tensor,
    new_tokens: int,
    *,
    compiled: bool = False,
    clock: str = "wall",
    backend: str | Callable[..., Any] = "inductor",
    log: Callable[[str], None] = print,
    ready: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median seconds per token of each model and way to decode, in turns of 8 tokens.

    Args:
        models: transformers' models by name.
        prompt: int64 [1, tokens].
        new_tokens: timed steps, rounded up to whole turns.
        compiled: also decode with a static cache, eagerly and with ``torch.compile(fullgraph=True)``.
        clock: a key of CLOCKS.
        backend: of torch.compile.
        log: takes a line for each model that is compiled.
        ready: called after all compilation, before the first timed turn.
    """
    from transformers import DynamicCache, StaticCache

    length = prompt.shape[1] + _turns(new_tokens) * (_TURN + 1) + _COMPILING_STEPS + 1
    decoders = {}
    for name, model in models.items():
        config: Any = model.config
        decoders[f"{name} {EAGER}"] = Decoder(model, prompt, cache=DynamicCache())
        if compiled:
            forward = torch.compile(model, fullgraph=True, backend=backend)
            for way, function in ((EAGER_STATIC, None), (COMPILED, forward)):
                cache = StaticCache(config, max_cache_len=length)
                decoders[f"{name} {way}"] = Decoder(model, prompt, cache=cache, forward=function)
            start = time.perf_counter()
            for _ in range(_COMPILING_STEPS):
                decoders[f"{name} {COMPILED}"].step()
            log(f"{name}: compiled in {time.perf_counter() - start:.0f} s")
    ready()
    now = CLOCKS[clock]
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(_turns(new_tokens)):
        for name, decoder in decoders.items():
            decoder.step()
            decoder.wait()
            for _ in range(_TURN):
                start = now()
                decoder.step()
                decoder.wait()
                samples[name].append(now() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def text(result: Result) -> str:
    """The result as a few lines."""
    facts = result.conditions
    turns = "in turn" if result.interleaved else "one model after the other: memory does not hold both"
    lines = [
        f"# {result.model}, {result.layers} layers, W{result.bits}A{result.act_bits} in groups of {result.group_size}, "
        f"batch 1, {result.new_tokens} tokens after {result.context}",
        f"# {facts.get('device', facts['cpu'])}, {facts['isa']}, {result.threads} threads, torch {facts['torch']}, "
        f"medians of {result.clock} time, {turns}",
    ]
    lines += [f"{name:34} {1e3 * value:8.2f} ms a token" for name, value in result.seconds.items()]
    lines.append(
        f"{result.speedup:.2f} x faster, {result.times_smaller:.2f} x smaller: {result.packed_bytes / 1e9:.3f} GB on "
        f"disk against {result.fp16_bytes / 1e9:.3f} GB (embedding, head and norms in 16 bits)"
    )
    return "\n".join(lines)


def _turns(new_tokens: int) -> int:
    return -(-new_tokens // _TURN)


# The demo's model.


def _demo_builders(bits: int, group_size: int, act_bits: int) -> tuple[dict[str, Callable[[], nn.Module]], int]:
    """Builders of both models, and the group size that all layers can have."""
    model = load_float(DEMO)[0]
    group_size = min(group_size_for(layer.in_features, group_size) for layer in _layers(model).values())

    def ours() -> nn.Module:
        quantized = copy.deepcopy(model)
        # Evenly spaced levels are found fastest.
        quantize_model(quantized, bits, group_size, act_bits, levels="uniform")
        return quantized.to(torch.bfloat16)

    return {OURS: ours, TORCH: lambda: model.to(torch.bfloat16)}, group_size


# LLaMAs with random weights.


def random_builders(
    shape: Mapping[str, int], bits: int, group_size: int, act_bits: int
) -> dict[str, Callable[[], nn.Module]]:
    ends: dict[str, nn.Parameter] = {}

    def packed(out_features: int, in_features: int) -> nn.Module:
        group = group_size_for(in_features, group_size)
        weight = random_packed_weight(out_features, in_features, bits, group)
        return QuantLinear.from_packed(weight, act_bits=act_bits)

    def dense(out_features: int, in_features: int) -> nn.Module:
        layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer.weight = _random_parameter((out_features, in_features), in_features**-0.5)
        return layer

    return {OURS: lambda: random_model(shape, packed, ends), TORCH: lambda: random_model(shape, dense, ends)}


def random_model(
    shape: Mapping[str, int], linear: Callable[[int, int], nn.Module], ends: dict[str, nn.Parameter]
) -> nn.Module:
    """A LLaMA in bfloat16 whose decoder layers have linears of `linear`(out_features, in_features).

    Args:
        ends: embedding and head by name, filled by the first model and shared with the next one.
    """
    model = _empty_llama(shape)
    for name, layer in _layers(model).items():
        model.set_submodule(name, linear(layer.out_features, layer.in_features))
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if parameter.dim() == 1:
            value = nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16), requires_grad=False)
        elif name in ends:
            value = ends[name]
        else:
            value = ends[name] = _random_parameter(parameter.shape, 0.02)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)
    inner: Any = model.get_submodule("model")
    inner.rotary_emb = type(inner.rotary_emb)(model.config)
    return model


def _empty_llama(shape: Mapping[str, int]) -> nn.Module:
    """LlamaForCausalLM on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_dict(dict(shape))).eval()


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers without the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def weight_counts(shape: Mapping[str, int]) -> tuple[int, int]:
    """Weights of a LLaMA in its decoder's linears, and in embedding, head and norms."""
    model = _empty_llama(shape)
    linears = sum(layer.weight.numel() for layer in _layers(model).values())
    return linears, sum(parameter.numel() for parameter in model.parameters()) - linears


def _random_parameter(size: tuple[int, ...], scale: float) -> nn.Parameter:
    """bfloat16 values drawn from a block that repeats: billions of separate draws would take minutes."""
    block = (torch.randn(1 << 20) * scale).bfloat16()
    out = torch.empty(*size, dtype=torch.bfloat16)
    for part in out.view(-1).split(block.numel()):
        part.copy_(block[: part.numel()])
    return nn.Parameter(out, requires_grad=False)


def _write_safetensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _fits_together(shape: Mapping[str, int], bits: int, device: torch.device) -> bool:
    """Whether memory holds the packed and the bfloat16 model at once.

    Raises:
        MemoryError: memory does not hold the bfloat16 model alone.
    """
    linears, others = weight_counts(shape)
    floats = 2 * (linears + others)
    packed = linears * (bits + 1) // 8
    available = hardware.memory_available_bytes(device)
    if available is None:
        return True
    if available < floats + _SLACK_BYTES:
        raise MemoryError(
            f"the bfloat16 model to compare with needs {floats / 1e9:.1f} GB and 1 GB of slack, but "
            f"{available / 1e9:.1f} GB are available; pass fewer --layers"
        )
    return available >= floats + packed + _SLACK_BYTES
