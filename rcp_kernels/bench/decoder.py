"""A whole LLaMA-shaped decoder with random weights: packed 2-bit layers against torch bfloat16, token by token.

No checkpoint is needed: speed and size do not depend on the values. The quantized model is built layer by layer in
packed form, so that it never exists in float, and the modules around the linear layers are the same for both.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import QuantLinear, extras, hardware
from . import common


@dataclass(frozen=True)
class Shape:
    """Dimensions of a LLaMA-architecture model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear of one layer."""
        kv = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_weights(self) -> int:
        """Weights in all linears of all layers; lm_head is not among them."""
        return self.layers * sum(n * k for n, k in self.linears().values())

    @property
    def other_weights(self) -> int:
        """Embedding, lm_head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 500000.0),
}

LinearFactory = Callable[[int, int], nn.Module]


class Attention(nn.Module):
    """Self-attention over a cache of fixed length, one new token at a time."""

    def __init__(self, shape: Shape, linear: LinearFactory, cache_length: int, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = shape.linears()
        self.head_dim = shape.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linear(*sizes[name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        cache = torch.zeros(2, 1, shape.kv_heads, cache_length, shape.head_dim, dtype=dtype)
        self.register_buffer("cache", cache.normal_(), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """x [1, 1, hidden] -> [1, 1, hidden]; the token at `position` sees all before it."""
        q, k, v = (
            projection(x).view(1, 1, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        assert isinstance(self.cache, Tensor)
        self.cache[0, :, :, position] = rotate(k, cos, sin)[:, :, 0]
        self.cache[1, :, :, position] = v[:, :, 0]
        keys, values = self.cache[:, :, :, : position + 1]
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), keys, values, enable_gqa=q.shape[1] != keys.shape[1])
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(1, 1, -1))
        return out


class Layer(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm."""

    def __init__(self, shape: Shape, linear: LinearFactory, cache_length: int, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = shape.linears()
        self.input_norm = nn.RMSNorm(shape.hidden, eps=1e-5, dtype=dtype)
        self.attention = Attention(shape, linear, cache_length, dtype)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-5, dtype=dtype)
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(*sizes[name]) for name in ("gate_proj", "up_proj", "down_proj")
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """x [1, 1, hidden] -> [1, 1, hidden]."""
        x = x + self.attention(self.input_norm(x), cos, sin, position)
        h = self.mlp_norm(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return out


class Decoder(nn.Module):
    """Embedding, layers, norm and lm_head; `ends` (embedding and lm_head, [vocabulary, hidden]) may be shared."""

    def __init__(self, shape: Shape, layers: nn.ModuleList, ends: tuple[Tensor, Tensor], cache_length: int) -> None:
        super().__init__()
        self.embedding, self.lm_head = (nn.Parameter(end, requires_grad=False) for end in ends)
        self.layers = layers
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5, dtype=ends[0].dtype)
        inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(cache_length), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(ends[0].dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(ends[0].dtype), persistent=False)

    def forward(self, token: Tensor, position: int) -> Tensor:
        """token int64 [1, 1] at `position` -> logits [1, 1, vocabulary]."""
        assert isinstance(self.cos, Tensor)
        assert isinstance(self.sin, Tensor)
        x = F.embedding(token, self.embedding)
        cos, sin = self.cos[position], self.sin[position]
        for layer in self.layers:
            x = layer(x, cos, sin, position)
        return F.linear(self.norm(x), self.lm_head)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [1, heads, 1, head_dim] by the angles of one position, [head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def random_tensor(*size: int, scale: float) -> Tensor:
    """bfloat16 values drawn from a block that repeats: billions of separate draws would take minutes."""
    block = (torch.randn(1 << 20) * scale).bfloat16()
    out = torch.empty(*size, dtype=torch.bfloat16)
    flat = out.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    return out


def float_linear(out_features: int, in_features: int) -> nn.Module:
    """nn.Linear in bfloat16 with random weights."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(random_tensor(out_features, in_features, scale=in_features**-0.5), requires_grad=False)
    return linear


def quant_linear(bits: int, group_size: int, act_bits: int) -> LinearFactory:
    """A factory of QuantLinear with random packed weights."""

    def make(out_features: int, in_features: int) -> nn.Module:
        group = common.group_size_for(in_features, group_size)
        packed = common.random_packed_weight(out_features, in_features, bits, group)
        return QuantLinear.from_packed(packed, act_bits=act_bits)

    return make


@dataclass
class Result:
    """Outcome for one model shape. Seconds per token are medians; bytes are those of the tensors on disk."""

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
    build_seconds: float
    seconds_per_token: float = float("nan")
    bf16_seconds_per_token: float = float("nan")

    @property
    def speedup(self) -> float:
        return self.bf16_seconds_per_token / self.seconds_per_token

    @property
    def times_smaller(self) -> float:
        return self.fp16_bytes / self.packed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types, ratios included."""
        return asdict(self) | {"speedup": self.speedup, "times_smaller": self.times_smaller}


def measure(
    model: str,
    *,
    layers: int | None = None,
    bits: int = 2,
    act_bits: int = 4,
    group_size: int = 128,
    context: int = 128,
    new_tokens: int = 16,
    save: Path | None = None,
    log: Callable[[str], None] = print,
) -> Result:
    """Build both models and decode new_tokens with each, in turn, after `context` positions of random cache.

    Where memory does not hold both at once, they are built, measured and freed one after the other, and the result
    says so (`interleaved`).

    Args:
        model: a key of SHAPES.
        layers: only this many layers, for a quick look; all by default.
        save: write the packed model there as safetensors.
        log: takes progress lines.

    Raises:
        ValueError: unknown model, or layers, context or new_tokens below 1.
        MemoryError: not even the bfloat16 model alone fits.
        MissingExtra: `save` without safetensors.
    """
    if model not in SHAPES:
        raise ValueError(f"unknown model {model!r}; one of: {', '.join(SHAPES)}")
    if min(context, new_tokens, 1 if layers is None else layers) < 1:
        raise ValueError(f"layers, context and new_tokens must be at least 1, got {layers}, {context}, {new_tokens}")
    if save is not None:
        extras.require("safetensors")
    shape = SHAPES[model]
    if layers is not None:
        shape = Shape(**{**asdict(shape), "layers": layers})
    interleaved = _fits_together(shape, bits)
    length = context + new_tokens + 1

    log(f"building {model}, {shape.layers} layers, W{bits}A{act_bits} in packed form")
    start = time.perf_counter()
    ends = tuple(random_tensor(shape.vocabulary, shape.hidden, scale=0.02) for _ in range(2))
    factory = quant_linear(bits, group_size, act_bits)
    ours = Decoder(shape, _layers(shape, factory, length), (ends[0], ends[1]), length).eval()
    result = Result(
        model=model,
        layers=shape.layers,
        bits=bits,
        act_bits=act_bits,
        group_size=group_size,
        context=context,
        new_tokens=new_tokens,
        threads=torch.get_num_threads(),
        interleaved=interleaved,
        conditions=hardware.conditions(),
        packed_bytes=sum(t.nbytes for _, tensors in packed_tensors(ours) for t in tensors.values()),
        fp16_bytes=2 * (shape.linear_weights + shape.other_weights),
        build_seconds=time.perf_counter() - start,
    )
    if save is not None:
        log(f"writing {result.packed_bytes / 1e9:.2f} GB to {save}")
        write_safetensors(ours, save)

    models: dict[str, nn.Module] = {"ours": ours}
    seconds: dict[str, float] = {}
    if not interleaved:
        seconds |= _decode_seconds(models, context, new_tokens)
        del models["ours"], ours
    log(f"building the same in bfloat16, {2 * shape.linear_weights / 1e9:.1f} GB")
    models["bf16"] = Decoder(shape, _layers(shape, float_linear, length), (ends[0], ends[1]), length).eval()
    log(f"decoding {new_tokens} tokens with each" + (", in turn" if interleaved else ""))
    seconds |= _decode_seconds(models, context, new_tokens)
    result.seconds_per_token, result.bf16_seconds_per_token = seconds["ours"], seconds["bf16"]
    return result


def packed_tensors(model: Decoder) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The model's tensors as they go to disk, one part at a time: 16-bit floats, and packed weights in format 1."""
    half = {"embedding": model.embedding, "lm_head": model.lm_head, "norm.weight": model.norm.weight}
    yield "ends", {name: tensor.detach().half() for name, tensor in half.items()}
    for i, layer in enumerate(model.layers):
        tensors = layer.state_dict(prefix=f"layers.{i}.")
        yield f"layer-{i:02d}", {k: t.half() if t.is_floating_point() and t.dim() else t for k, t in tensors.items()}


def write_safetensors(model: Decoder, folder: Path) -> None:
    """Write one safetensors file for each part of packed_tensors, and the usual index beside them."""
    from safetensors.torch import save_file

    common.output_directory(folder)
    weight_map: dict[str, str] = {}
    total = 0
    for part, tensors in packed_tensors(model):
        file_name = f"model-{part}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def text(result: Result) -> str:
    """The result as a few lines."""
    facts = result.conditions
    return "\n".join(
        (
            f"# {result.model}, {result.layers} layers, W{result.bits}A{result.act_bits}, groups of "
            f"{result.group_size}, random weights; batch 1, context {result.context}",
            f"# {facts['cpu']}, {facts['isa']}, {result.threads} threads, torch {facts['torch']}, "
            f"median of {result.new_tokens} tokens"
            + ("" if result.interleaved else "; memory does not hold both models: measured one after the other"),
            f"rcp_kernels  {1 / result.seconds_per_token:8.2f} tokens/s  {result.seconds_per_token * 1e3:8.1f} ms  "
            f"{result.packed_bytes / 1e9:7.3f} GB on disk (embedding, lm_head and norms 16-bit)",
            f"torch bf16   {1 / result.bf16_seconds_per_token:8.2f} tokens/s  "
            f"{result.bf16_seconds_per_token * 1e3:8.1f} ms  {result.fp16_bytes / 1e9:7.3f} GB on disk",
            f"{result.speedup:.2f} x faster, {result.times_smaller:.2f} x smaller",
        )
    )


def _layers(shape: Shape, linear: LinearFactory, cache_length: int) -> nn.ModuleList:
    return nn.ModuleList(Layer(shape, linear, cache_length, torch.bfloat16) for _ in range(shape.layers))


@torch.inference_mode()
def _decode_seconds(models: dict[str, nn.Module], context: int, new_tokens: int) -> dict[str, float]:
    """Median seconds per token of each model; they take turns of one token (each token reads the whole model)."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    tokens = {name: torch.ones(1, 1, dtype=torch.int64) for name in models}
    for step in range(new_tokens + 1):
        for name, model in models.items():
            start = time.perf_counter()
            tokens[name] = model(tokens[name], context + step).argmax(-1)
            seconds[name].append(time.perf_counter() - start)
    # The first token also wakes the thread pool and touches everything for the first time.
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _fits_together(shape: Shape, bits: int) -> bool:
    """Whether memory holds the packed and the bfloat16 model at once; raises if not even the latter alone fits."""
    floats = 2 * (shape.linear_weights + shape.other_weights)
    packed = shape.linear_weights * (bits + 1) // 8
    slack = 1 << 30
    available = hardware.memory_available_bytes()
    if available is None:
        return True
    if available < floats + slack:
        raise MemoryError(
            f"the bfloat16 model to compare with takes {floats / 1e9:.1f} GB and 1 GB of slack, but "
            f"{available / 1e9:.1f} GB are available; pass fewer --layers (of {shape.layers})"
        )
    return available >= floats + packed + slack
