"""The memory of an RCP training on its device, from the training's own functions on the meta device."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ..methods.layers import first_layer_inputs
from ..methods.ldp import LearnableDirectPartitioning
from ..methods.rcp.block_reconstruction import BlockConfig, BlockState, train_layer
from ..methods.rcp.config import RcpConfig
from ..methods.rcp.distillation import distillation_loss
from ..methods.rcp.forward import StudentAndTeacher
from ..methods.rcp.optimizer import make_optimizer
from ..methods.student import FakeQuantLinear, fake_quantized_kv, students, with_quantized_weights
from ..models import describe
from .memory import MemoryCounter, functions_for_meta

__all__ = ["phase_one_bytes", "phase_two_bytes"]

# Bytes of a state of torchao's 8-bit AdamW: a code for each value, and a float32 scale for 256 values.
_STATE_8BIT = 1 + 4 / 256


def phase_one_bytes(model: nn.Module, config: RcpConfig, blocks: BlockConfig, window: int, fused: bool) -> Counter[str]:
    """Bytes on the device at the peak of :func:`rcp_kernels.methods.rcp.block_reconstruction.train_layer`, by part.

    Args:
        model: float32 on the meta device; its linear layers become trainable.
        config: of the training.
        blocks: of phase one.
        window: tokens of a sequence.
        fused: see :func:`rcp_kernels.pipeline.memory.functions_for_meta`.
    """
    layer = describe(model).layers[0]
    module = model.get_submodule(layer.name)
    with MemoryCounter(), functions_for_meta(fused):  # the counter answers what the code reads back from the device
        hidden, keywords = first_layer_inputs(model, torch.zeros((1, window), dtype=torch.int64))
    _make_student(model, config)
    hidden = torch.empty((blocks.batch, *hidden.shape[1:]), device="meta")  # on the host in a training
    blocks = BlockConfig(sequences=blocks.batch, epochs=2, batch=blocks.batch)
    counter = MemoryCounter()
    autocast = functools.partial(_autocast, config)
    counter.watch(module, "weights")
    with (
        fake_quantized_kv(module, config.kv_bits, config.kv_clip, "dry run") as cache,
        counter,
        functions_for_meta(fused),
    ):
        extra = {**keywords[0], **cache}
        train_layer(module, layer.name, BlockState(0, hidden, hidden), extra, blocks, autocast, 0, hidden.device)
    return max(counter.peaks.values(), key=Counter.total)


def phase_two_bytes(
    build: Callable[[int], nn.Module],
    layers: int,
    config: RcpConfig,
    window: int,
    fused: bool,
    processes: int = 1,
    shard: bool = False,
) -> Counter[str]:
    """Bytes on the device of one process at the peak of an update of phase two, by part.

    All layers are alike, so models of one and of two layers decide what a layer adds.

    Args:
        build: (decoder layers) -> a float32 model on the meta device.
        layers: of the model.
        config, window, fused: as for :func:`phase_one_bytes`.
        processes: that share a batch.
        shard: whether FSDP2 splits the decoder layers. Their share of a process is computed, not counted.
    """
    parts = max(1, config.batch // (config.micro_batch * processes))
    one, two = (_update(build(count), config, window, fused, parts) for count in (1, 2))
    moments = []
    for moment, less in one.items():
        more = two[moment]
        found = Counter({part: less[part] + (layers - 1) * (more[part] - less[part]) for part in more})
        if config.optimizer == "adamw8bit":
            found["optimizer states"] = int(found["optimizer states"] / 4 * _STATE_8BIT)
        if shard:
            _shard(found, build(1), config, layers, processes)
        moments.append(found)
    return max(moments, key=Counter.total)


def _update(model: nn.Module, config: RcpConfig, window: int, fused: bool, parts: int) -> dict[str, Counter[str]]:
    """The peaks of an update, as :attr:`MemoryCounter.peaks`. The second of two updates begins with all states."""
    counter = MemoryCounter()
    models = StudentAndTeacher(model, None, config, torch.device("meta"))
    models.autocast = functools.partial(_autocast, config)  # type: ignore[method-assign]
    _make_student(model, config)
    counter.watch(model, "weights")
    counter.watch(models.teacher_model, "teacher")
    optimizer = make_optimizer(students(model), config.weight_lr, config.quantizer_lr, config.beta2)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = torch.empty((config.micro_batch, window), dtype=torch.int64, device="meta")
    recomputed = models.recomputed_layers() if config.activation_checkpointing else contextlib.nullcontext()
    with counter, functions_for_meta(fused), recomputed:
        for _ in range(2):
            quantized = with_quantized_weights(model, models.dtype)
            with counter.tagged("quantized weights"):
                quantized.__enter__()
            for _ in range(min(parts, 2)):  # the second one begins with gradients
                teacher, head = models.teacher(ids), models.head
                with counter.tagged("activations"):
                    hidden = models.student(ids)
                with counter.tagged("logits"):
                    loss = distillation_loss(hidden, teacher, head, head, 0.5)
                with counter.tagged("gradients"):
                    loss.backward()
                del teacher, hidden, loss
            with counter.tagged("gradients of weights"):
                quantized.__exit__(None, None, None)
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            with counter.tagged("optimizer states"):
                optimizer.step()
            optimizer.zero_grad()
    return counter.peaks


def _shard(found: Counter[str], model: nn.Module, config: RcpConfig, layers: int, processes: int) -> None:
    """Divide the parts that FSDP2 splits, and add what it holds whole: two layers, and the gradients of two."""
    layer = model.get_submodule(describe(model).layers[0].name)
    weights = sum(p.nbytes for p in layer.parameters())
    split = {
        "weights": layers * weights,
        "teacher": layers * weights // (2 if config.bf16 else 1),
        "optimizer states": found["optimizer states"],
        "gradients of weights": found["gradients of weights"],
    }
    for part, size in split.items():
        found[part] -= size - size // processes
    if config.activation_checkpointing:
        # Sharded weights are quantized while their layer runs. The backward pass needs the quantized weights of all
        # layers, unless it computes each layer again.
        for part in ("quantized weights", "gradients"):
            found[part] //= layers
    found["gathered layers"] = 4 * weights


def _make_student(model: nn.Module, config: RcpConfig) -> None:
    """:func:`rcp_kernels.methods.student.make_student` without a choice of levels, which needs values."""
    model.requires_grad_(False)
    for name in (name for layer in describe(model).layers for name in layer.linears):
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            quantizer = LearnableDirectPartitioning(
                tuple(linear.weight.shape),
                config.bits,
                config.group_size,
                config.learn_clip,
                config.learn_partition,
                device="meta",
            )
            model.set_submodule(name, FakeQuantLinear(linear, quantizer, config.act_bits, config.act_clip, name))


def _autocast(config: RcpConfig) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.bf16)
