"""One RCP training: its state, its checkpoint, its forward passes and its two phases. ``rcp.train`` is the way in."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models import describe
from ...models.hf import cache_argument
from ...nn.model_digest import model_digest
from ..layers import Diverged
from ..student import FakeQuantKV, first_bad_layer, held, is_finite, students
from .block_reconstruction import BlockState, reconstruct_blocks, schedule
from .config import RcpConfig, TrainResult
from .distillation import Head, cast_parameters, distillation_loss, mean_confidence, reverse_weight, student_perplexity
from .student_state import (
    copy_student,
    split_optimizer_state,
    start_student,
    student_values,
    whole,
    whole_optimizer_state,
)
from .training_state import LogFile, load_state, save_state

__all__ = ["Run"]

_CONFIDENCE_BATCHES = 10


class Run:
    """See :func:`rcp_kernels.methods.rcp.train` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        training: Tensor,
        validation: Tensor,
        config: RcpConfig,
        teacher: nn.Module | None,
        probes: Mapping[str, Tensor],
        directory: Path | None,
        accelerator: Any,
        shard: bool,
        progress: Callable[[str, int, int, str], None] | None,
    ) -> None:
        self.config = config
        self.shard = shard
        self.model = model
        self.device = next(model.parameters()).device
        self.ranks = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.accelerator = accelerator
        self.training, self.validation, self.probes = training, validation, probes
        self.directory = directory
        self.progress = progress or (lambda *_: None)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.teacher = copy.deepcopy(model) if teacher is None else teacher
        cast_parameters(self.teacher, self.dtype).eval().requires_grad_(False)
        architecture = describe(model)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        # One head for both: the student's is the teacher's, and stays so.
        self.head = Head(self.teacher.get_submodule(architecture.head).weight, softcap)  # type: ignore[arg-type]
        self.state_path = None if directory is None else directory / "state.pt"
        self.digest = model_digest(model)  # of what training begins with
        stored = self._stored()
        # What a checkpoint overwrites need not be searched for.
        self.architecture = start_student(model, config, config.init if stored is None else "uniform")
        self.layers = students(model)
        self.parameters: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_state: dict[str, Any] | None = None
        self.step = 0
        self.blocks_done = config.blocks is None
        self.block_state: BlockState | None = None
        self.best_step, self.best = 0, math.inf
        self.best_state: dict[str, Tensor] | None = None
        self.confidence: float | None = None
        self.cpu_before, self.seconds_before = -time.process_time(), -time.perf_counter()
        lines = 0
        if stored is not None:
            lines = self._restore(stored)
        log = None if directory is None or self.rank else directory / "log.jsonl"
        self.log = LogFile(log, lines)
        self.pool = None
        if config.workers > 1 and self.device.type == "cpu" and not shard:
            self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))

    def _map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """The results of a function of each item, from several threads if there are any."""
        return list(map(function, items) if self.pool is None else self.pool.map(function, items))

    # --- checkpoint

    def _fingerprint(self) -> str:
        """Tells one run from another: its settings, its model, rotated, and its text."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        digest.update(self.digest.encode())
        digest.update(self.training.cpu().numpy().tobytes())
        digest.update(self.validation.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _stored(self) -> dict[str, Any] | None:
        if self.state_path is None or not self.state_path.exists():
            return None
        stored = load_state(self.state_path)
        if stored["run"] != self._fingerprint():
            raise ValueError(
                f"resume: {self.state_path} must be of a run with the same settings, model, rotation and text, got one "
                f"of another; pass the same arguments, or another folder"
            )
        return stored

    def _student_state(self) -> dict[str, Tensor]:
        return {name: whole(value) for name, value in student_values(self.layers).items()}

    def _begin_phase_two(self) -> None:
        """Make the optimizer, of parameters that are split over the processes before if they are to be."""
        if self.ranks > 1:
            # Each process did phase one by itself; kernels or machines that differ would leave replicas that differ.
            for value in (p.data for layer in self.layers for p in layer.parameters()):
                torch.distributed.broadcast(value, 0)
        if self.shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.ranks,))
            for model in (self.model, self.teacher):
                for layer in self.architecture.layers:
                    fully_shard(model.get_submodule(layer.name), mesh=mesh)
        config = self.config
        weights = [layer.weight for layer in self.layers]
        quantizers = [p for layer in self.layers for p in layer.quantizer.parameters()]
        self.parameters = weights + quantizers
        groups: list[dict[str, Any]] = [{"params": weights, "peak": config.weight_lr}]
        if quantizers:
            groups.append({"params": quantizers, "peak": config.quantizer_lr})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.beta2), weight_decay=0.0)
        if self.optimizer_state is not None:
            self.optimizer.load_state_dict(split_optimizer_state(self.optimizer_state, self.parameters))
            self.optimizer_state = None

    def _held(self) -> contextlib.AbstractContextManager[None]:
        """Weights quantized once for several passes; where they are split, each layer's exist only while it runs."""
        return contextlib.nullcontext() if self.shard else held(self.model, self.dtype, self._map)

    def _save(self) -> None:
        if self.state_path is None:
            return
        # The checkpoint that is there must not give way to one that cannot be gone on from.
        for layer in self.layers:
            if not all(is_finite(value) for value in layer.parameters()):
                raise Diverged(
                    f"train: weights must be finite, got NaN or Inf after step {self.step} in layer {layer.name}; "
                    f"{self._last_good()}"
                )
        block = self.block_state
        student = self._student_state()
        optimizer = None if self.optimizer is None else whole_optimizer_state(self.optimizer)
        if self.rank:
            return
        save_state(
            self.state_path,
            {
                "run": self._fingerprint(),
                "step": self.step,
                "blocks_done": self.blocks_done,
                "blocks": None if block is None else [block.next_layer, block.student, block.teacher],
                "student": student,
                "optimizer": optimizer,
                "best_step": self.best_step,
                "best": self.best,
                "confidence": self.confidence,
                "log_lines": self.log.lines,
                "cpu_seconds": self._cpu_seconds(),
                "seconds": self._seconds(),
            },
        )

    def _restore(self, stored: dict[str, Any]) -> int:
        copy_student(self.layers, stored["student"])
        self.step = stored["step"]
        self.blocks_done = stored["blocks_done"]
        if stored["blocks"] is not None:
            self.block_state = BlockState(*stored["blocks"])
        self.optimizer_state = stored["optimizer"]
        self.best_step, self.best = stored["best_step"], stored["best"]
        self.confidence = stored["confidence"]
        self.cpu_before += stored["cpu_seconds"]
        self.seconds_before += stored["seconds"]
        return int(stored["log_lines"])

    def _cpu_seconds(self) -> float:
        return self.cpu_before + time.process_time()

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter()

    # --- forward passes

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def _hidden(self, model: nn.Module, ids: Tensor, quantize_kv: bool) -> Tensor:
        """Hidden states after the final norm, [sequences * tokens, hidden_size]."""
        cache = FakeQuantKV(self.config.kv_bits, self.config.kv_clip) if quantize_kv else None
        decoder = model.get_submodule(self.architecture.final_norm.rpartition(".")[0])
        output = decoder(input_ids=ids.to(self.device), use_cache=False, **cache_argument(decoder, cache))
        if cache is not None:
            cache.check_asked("train")
        return output.last_hidden_state.flatten(0, 1)

    def _student(self, ids: Tensor) -> Tensor:
        with self._autocast():
            return self._hidden(self.model, ids, self.config.kv_bits != 16)

    @torch.no_grad()
    def _teacher(self, ids: Tensor) -> Tensor:
        return self._hidden(self.teacher, ids, False).to(self.dtype)

    # --- the run

    def run(self) -> TrainResult:
        config = self.config
        self.model.eval()  # no dropout: teacher and student see the same
        try:
            if not self.blocks_done:
                self._phase_one()
            if self.confidence is None:
                # Not at the start: in phase one the teacher's head would only wait.
                parts = list(self.training.split(config.micro_batch)[:_CONFIDENCE_BATCHES])
                self.confidence = mean_confidence(self._teacher, self.head, parts)
            self._begin_phase_two()
            if self.step == 0:
                self._validate()
            m = reverse_weight(config.loss, self.confidence)
            while self.step < config.steps:
                self._update(m)
                last = self.step == config.steps
                if last or self.step % config.validate_every == 0:
                    self._validate()
                if last or self.step % config.checkpoint_every == 0:
                    self._save()
        except ValueError as error:
            # The quantizers of activations and weights refuse NaN with the layer's name.
            if "finite" not in str(error):
                raise
            raise Diverged(f"{error}; {self._last_good()}") from error
        self._load_best()
        return TrainResult(
            steps=self.step,
            tokens=self.step * config.batch * self.training.shape[1],
            best_step=self.best_step,
            best_perplexity=self.best,
            confidence=self.confidence,
            cpu_seconds=self._cpu_seconds(),
        )

    def _phase_one(self) -> None:
        assert self.config.blocks is not None
        total = len(self.architecture.layers)

        def after_layer(state: BlockState, losses: list[float]) -> None:
            self.block_state = state
            self.log.write(
                {
                    "kind": "layer",
                    "layer": state.next_layer - 1,
                    "losses": losses,
                    "seconds": self._seconds(),
                    "cpu_seconds": self._cpu_seconds(),
                }
            )
            self.progress("layers", state.next_layer, total, f"loss {losses[-1]:.4f}")
            if state.next_layer % 5 == 0 and state.next_layer < total:
                self._save()

        reconstruct_blocks(
            self.model,
            self.teacher,
            self.training.to(self.device),
            self.config.blocks,
            kv_bits=self.config.kv_bits,
            kv_clip=self.config.kv_clip,
            autocast=self._autocast,
            seed=self.config.seed,
            state=self.block_state,
            after_layer=after_layer,
        )
        self.blocks_done, self.block_state = True, None
        self._save()

    def _micro_batches(self) -> tuple[Tensor, ...]:
        """This process's share of the update's sequences."""
        config = self.config
        rows = torch.arange(self.step * config.batch, (self.step + 1) * config.batch) % self.training.shape[0]
        return self.training[rows[self.rank :: self.ranks]].split(config.micro_batch)

    def _update(self, m: float) -> None:
        config = self.config
        assert self.optimizer is not None
        started = time.perf_counter()
        share = schedule(self.step, config.steps, config.warmup, config.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        parts = self._micro_batches()

        def backward(ids: Tensor) -> Tensor:
            teacher = self._teacher(ids)
            part = distillation_loss(self._student(ids), teacher, self.head, self.head, m) / len(parts)
            part.backward()
            return part.detach()

        with self._held():
            loss = torch.stack(self._map(backward, parts)).sum()
        if self.ranks > 1:
            for parameter in self.parameters if not self.shard else ():  # FSDP2 has averaged its own
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            loss = self.accelerator.reduce(loss, "mean")
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            raise Diverged(
                f"train: loss and gradient must be finite, got {float(loss)} and a norm of {float(norm)} at step "
                f"{self.step} in layer {self._first_bad_layer(parts[0])}; {self._last_good()}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = config.batch * self.training.shape[1]
        rate = tokens / (time.perf_counter() - started)
        self.log.write(
            {
                "kind": "step",
                "step": self.step,
                "loss": float(loss),
                "gradient_norm": float(norm),
                "lr_share": share,
                "tokens_per_second": rate,
                "cpu_seconds": self._cpu_seconds(),
            }
        )
        self.progress("steps", self.step, config.steps, f"loss {float(loss):.3f}, {rate:.0f} tokens/s")

    def _first_bad_layer(self, ids: Tensor) -> str:
        return first_bad_layer(self.model, lambda: self._student(ids), self.architecture.head)

    def _last_good(self) -> str:
        if self.state_path is None or not self.state_path.exists():
            return "no checkpoint was written yet: lower the learning rates and start again"
        return f"the last good checkpoint is {self.state_path}: lower the learning rates"

    @torch.no_grad()
    def _validate(self) -> None:
        started = time.perf_counter(), time.process_time()
        with self._held():
            value = student_perplexity(self._student, self.head, self.validation, self._map)
            probes = {
                name: student_perplexity(self._student, self.head, windows, self._map)
                for name, windows in self.probes.items()
            }
        if not math.isfinite(value):
            raise Diverged(
                f"train: the validation perplexity must be finite, got {value} after step {self.step} in layer "
                f"{self._first_bad_layer(self.validation[:1])}; {self._last_good()}"
            )
        if value < self.best:
            self.best, self.best_step = value, self.step
            if self.directory is None:
                self.best_state = {name: tensor.clone() for name, tensor in self._student_state().items()}
            else:
                student = self._student_state()
                if not self.rank:
                    save_state(self.directory / "best.pt", {"student": student, "model": self.digest})
        # What is measured is not trained: the budget is stated without it.
        self.seconds_before -= time.perf_counter() - started[0]
        self.cpu_before -= time.process_time() - started[1]
        self.log.write(
            {
                "kind": "validation",
                "step": self.step,
                "tokens": self.step * self.config.batch * self.training.shape[1],
                "validation": value,
                **probes,
                "seconds": self._seconds(),
                "cpu_seconds": self._cpu_seconds(),
            }
        )
        text = ", ".join(f"{name} {number:.2f}" for name, number in {"perplexity": value, **probes}.items())
        self.progress("validation", self.step, self.config.steps, text)

    def _load_best(self) -> None:
        if self.directory is not None:
            if self.accelerator is not None:
                self.accelerator.wait_for_everyone()
            if not self.shard:
                copy_student(self.layers, load_state(self.directory / "best.pt")["student"])
        elif self.best_state is not None:
            copy_student(self.layers, self.best_state)
