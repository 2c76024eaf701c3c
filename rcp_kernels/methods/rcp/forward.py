"""The forward passes of a student and its teacher."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...models import describe
from ..student import fake_quantized_kv
from .config import RcpConfig
from .distillation import Head

__all__ = ["StudentAndTeacher"]


class StudentAndTeacher:
    """A model that becomes the student, and its frozen teacher.

    Attributes:
        model: the student's.
        teacher_model: the teacher's, in ``dtype``.
        head: the output head of both; the student's stays equal to the teacher's.
        dtype: bfloat16 or float32, of the forward passes.
        device: of the forward passes. The models are elsewhere until :meth:`move`.
        architecture: of both.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, config: RcpConfig, device: torch.device | None = None
    ) -> None:
        """Take the teacher, or a copy of the model if there is none."""
        self.model = model
        self.device = next(model.parameters()).device if device is None else device
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.architecture = describe(model)
        self.teacher_model = _cast_parameters(copy.deepcopy(model) if teacher is None else teacher, self.dtype)
        self.teacher_model.eval().requires_grad_(False)
        self._kv = config.kv_bits, config.kv_clip

    @property
    def head(self) -> Head:
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return Head(self.teacher_model.get_submodule(self.architecture.head).weight, softcap)  # type: ignore[arg-type]

    def move(self) -> None:
        """Move the models to ``device``."""
        self.model.to(self.device)
        self.teacher_model.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def student(self, ids: Tensor) -> Tensor:
        """Hidden states after the final norm: int64 [sequences, tokens] -> [sequences * tokens, hidden_size]."""
        with self.autocast():
            return self._hidden(self.model, ids, *self._kv)

    @contextlib.contextmanager
    def recomputed_layers(self) -> Iterator[None]:
        """Decoder layers of the student that keep their input only, and run a second time in the backward pass.

        transformers' own switch works in training mode only. The student is in eval mode, without dropout, and its
        second run therefore gives the same bits without a stored state of the random generators.
        """
        layers = [self.model.get_submodule(layer.name) for layer in self.architecture.layers]
        for layer in layers:
            layer.forward = functools.partial(_recomputed, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    @torch.no_grad()
    def teacher(self, ids: Tensor) -> Tensor:
        """As :meth:`student`, of the teacher, in ``dtype``."""
        return self._hidden(self.teacher_model, ids, 16, 1.0).to(self.dtype)

    def _hidden(self, model: nn.Module, ids: Tensor, kv_bits: int, kv_clip: float) -> Tensor:
        decoder = model.get_submodule(self.architecture.final_norm.rpartition(".")[0])
        with fake_quantized_kv(decoder, kv_bits, kv_clip, "train") as cache:
            output = decoder(input_ids=ids.to(self.device), use_cache=False, **cache)
        return output.last_hidden_state.flatten(0, 1)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward`` under torch's activation checkpointing where gradients are enabled."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a model's parameters in place, but not of its buffers.

    ``model.to(dtype)`` would convert the frequencies of RoPE too. In bfloat16 the angle at position 4095 is then wrong
    by 5.7.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
