"""One RCP training: its two phases, its checkpoints and its log. ``rcp.train`` is the public function."""

from __future__ import annotations

import contextlib
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

from ...nn.model_digest import model_digest
from ..layers import Diverged
from ..student import first_bad_layer, is_finite, students, with_quantized_weights
from .block_reconstruction import BlockState, reconstruct_blocks
from .config import RcpConfig, TrainResult
from .distillation import distillation_loss, mean_confidence, reverse_weight, student_perplexity
from .forward import StudentAndTeacher
from .optimizer import (
    full_optimizer_state,
    full_tensor,
    make_optimizer,
    schedule,
    set_rates,
    split_optimizer_state,
)
from .student_state import copy_student, full_student_values, start_student
from .training_state import Clock, LogFile, load_state, save_state

__all__ = ["Training"]

_CONFIDENCE_BATCHES = 10


class Training:
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
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.shard = shard
        self.ranks = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.accelerator = accelerator
        self.training, self.validation, self.probes = training, validation, probes
        self.directory = directory
        self.progress = progress or (lambda *_: None)
        self.model = model
        self.models = StudentAndTeacher(model, teacher, config, device)
        self.state_path = None if directory is None else directory / "state.pt"
        self.digest = model_digest(model)  # of the float model
        stored = self._load_checkpoint()
        # A checkpoint overwrites the levels, so the search for initial levels is skipped.
        start_student(model, config, config.init if stored is None else "uniform", device)
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
        self.clock = Clock()
        log_lines = 0 if stored is None else self._restore(stored)
        self.log = LogFile(None if directory is None or self.rank else directory / "log.jsonl", log_lines)
        self.pool = None
        if config.workers > 1 and self.models.device.type == "cpu" and not shard:
            self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))

    def _map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """The results of a function for each item, computed by the worker threads if there are any."""
        return list(map(function, items) if self.pool is None else self.pool.map(function, items))

    def run(self) -> TrainResult:
        config = self.config
        self.model.eval()  # no dropout, as in the teacher
        try:
            if not self.blocks_done:
                self._phase_one()
            self._begin_phase_two()
            with self.models.recomputed_layers() if config.activation_checkpointing else contextlib.nullcontext():
                self._phase_two()
        except ValueError as error:
            # The quantizers of activations and weights refuse NaN and name the layer.
            if "finite" not in str(error):
                raise
            raise Diverged(f"{error}; {self._last_good()}") from error
        self._load_best()
        assert self.confidence is not None
        return TrainResult(
            steps=self.step,
            tokens=self._tokens(),
            best_step=self.best_step,
            best_perplexity=self.best,
            confidence=self.confidence,
            cpu_seconds=self.clock.fields()["cpu_seconds"],
        )

    def _tokens(self) -> int:
        return self.step * self.config.batch * self.training.shape[1]

    # --- phase one

    def _phase_one(self) -> None:
        assert self.config.blocks is not None
        total = len(self.models.architecture.layers)

        def after_layer(state: BlockState, losses: list[float]) -> None:
            self.block_state = state
            row = {"kind": "layer", "layer": state.next_layer - 1, "losses": losses, **self.clock.fields()}
            self.log.write(row)
            self.progress("layers", state.next_layer, total, f"loss {losses[-1]:.4f}")
            if state.next_layer % 5 == 0 and state.next_layer < total:
                self._save()

        reconstruct_blocks(
            self.model,
            self.models.teacher_model,
            self.training.to(next(self.model.parameters()).device),
            self.config.blocks,
            kv_bits=self.config.kv_bits,
            kv_clip=self.config.kv_clip,
            autocast=self.models.autocast,
            seed=self.config.seed,
            state=self.block_state,
            after_layer=after_layer,
            device=self.models.device,
        )
        self.blocks_done, self.block_state = True, None
        self._save()

    # --- phase two

    def _begin_phase_two(self) -> None:
        """Move the models to the device, split their decoder layers if they are to be sharded; make the optimizer."""
        if self.ranks > 1:
            # Each process computed phase one itself. Different kernels or machines would give different students.
            for value in (p.data for layer in self.layers for p in layer.parameters()):
                moved = value.to(self.models.device)
                torch.distributed.broadcast(moved, 0)
                value.copy_(moved)
        if self.shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.models.device.type, (self.ranks,))
            for model in (self.model, self.models.teacher_model):
                for layer in self.models.architecture.layers:  # moves one layer at a time to the device
                    fully_shard(model.get_submodule(layer.name), mesh=mesh)
        self.models.move()
        config = self.config
        self.optimizer = make_optimizer(
            self.layers, config.weight_lr, config.quantizer_lr, config.beta2, config.optimizer
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.optimizer_state is not None:
            self.optimizer.load_state_dict(split_optimizer_state(self.optimizer_state, self.parameters))
            self.optimizer_state = None

    def _phase_two(self) -> None:
        config = self.config
        if self.confidence is None:
            # Computed after phase one, which does not need the teacher's head.
            batches = list(self.training.split(config.micro_batch)[:_CONFIDENCE_BATCHES])
            self.confidence = mean_confidence(self.models.teacher, self.models.head, batches)
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

    def _quantized_weights(self) -> contextlib.AbstractContextManager[None]:
        """Quantize weights once for several passes. Sharded weights exist only while their layer runs."""
        if self.shard:
            return contextlib.nullcontext()
        return with_quantized_weights(self.model, self.models.dtype, self._map)

    def _update(self, m: float) -> None:
        config = self.config
        assert self.optimizer is not None
        started = time.perf_counter()
        share = schedule(self.step, config.steps, config.warmup, config.floor)
        set_rates(self.optimizer, share)
        rows = torch.arange(self.step * config.batch, (self.step + 1) * config.batch) % self.training.shape[0]
        parts = self.training[rows[self.rank :: self.ranks]].split(config.micro_batch)

        def backward(ids: Tensor) -> Tensor:
            teacher = self.models.teacher(ids)
            head = self.models.head
            part = distillation_loss(self.models.student(ids), teacher, head, head, m) / len(parts)
            part.backward()
            return part.detach()

        with self._quantized_weights():
            loss = torch.stack(self._map(backward, parts)).sum()
        if self.ranks > 1:
            for parameter in self.parameters if not self.shard else ():  # FSDP2 has averaged gradients already
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            loss = self.accelerator.reduce(loss, "mean")
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)))
        value = float(loss)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Diverged(
                f"train: loss and gradient must be finite, got {value} and a norm of {norm} at step {self.step} in "
                f"layer {self._first_bad_layer(parts[0])}; {self._last_good()}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        rate = config.batch * self.training.shape[1] / (time.perf_counter() - started)
        self.log.write(
            {
                "kind": "step",
                "step": self.step,
                "loss": value,
                "gradient_norm": norm,
                "lr_share": share,
                "tokens_per_second": rate,
                **self.clock.fields(),
            }
        )
        self.progress("steps", self.step, config.steps, f"loss {value:.3f}, {rate:.0f} tokens/s")

    def _first_bad_layer(self, ids: Tensor) -> str:
        return first_bad_layer(self.model, lambda: self.models.student(ids), self.models.architecture.head)

    @torch.no_grad()
    def _validate(self) -> None:
        with self.clock.paused():  # the training budget excludes validation
            with self._quantized_weights():
                value, *probed = (
                    student_perplexity(self.models.student, self.models.head, windows, self._map)
                    for windows in (self.validation, *self.probes.values())
                )
            if not math.isfinite(value):
                raise Diverged(
                    f"train: the validation perplexity must be finite, got {value} after step {self.step} in layer "
                    f"{self._first_bad_layer(self.validation[:1])}; {self._last_good()}"
                )
            if value < self.best:
                self.best, self.best_step = value, self.step
                self._save_best()
        probes = dict(zip(self.probes, probed, strict=True))
        row = {"kind": "validation", "step": self.step, "tokens": self._tokens(), "validation": value, **probes}
        self.log.write({**row, **self.clock.fields()})
        text = ", ".join(f"{name} {number:.2f}" for name, number in {"perplexity": value, **probes}.items())
        self.progress("validation", self.step, self.config.steps, text)

    # --- checkpoints

    def _fingerprint(self) -> str:
        """Digest of the settings, the rotated float model and the text: a checkpoint belongs to one of these.

        A run may go on with or without activation checkpointing, which changes no bit.
        """
        settings = {k: v for k, v in self.config.to_dict().items() if k != "activation_checkpointing"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.digest.encode())
        digest.update(self.training.cpu().numpy().tobytes())
        digest.update(self.validation.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _load_checkpoint(self) -> dict[str, Any] | None:
        if self.state_path is None or not self.state_path.exists():
            return None
        stored = load_state(self.state_path)
        if stored["run"] != self._fingerprint():
            raise ValueError(
                f"resume: {self.state_path} must be of a run with the same settings, model, rotation and text, got one "
                f"of another; pass the same arguments, or another folder"
            )
        return stored

    def _restore(self, stored: dict[str, Any]) -> int:
        """Continue from a checkpoint. Returns the number of lines of its log."""
        copy_student(self.layers, stored["student"])
        self.step = stored["step"]
        self.blocks_done = stored["blocks_done"]
        if stored["blocks"] is not None:
            self.block_state = BlockState(*stored["blocks"])
        self.optimizer_state = stored["optimizer"]
        self.best_step, self.best = stored["best_step"], stored["best"]
        self.confidence = stored["confidence"]
        self.clock.add(stored["seconds"], stored["cpu_seconds"])
        return int(stored["log_lines"])

    def _save(self) -> None:
        if self.state_path is None:
            return
        # A checkpoint with NaN must not replace a good one.
        for layer in self.layers:
            if not all(is_finite(value) for value in layer.parameters()):
                raise Diverged(
                    f"train: weights must be finite, got NaN or Inf after step {self.step} in layer {layer.name}; "
                    f"{self._last_good()}"
                )
        block = self.block_state
        student = full_student_values(self.layers, not self.rank)
        optimizer = None if self.optimizer is None else full_optimizer_state(self.optimizer, not self.rank)
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
                **self.clock.fields(),
            },
        )

    def _last_good(self) -> str:
        if self.state_path is None or not self.state_path.exists():
            return "no checkpoint was written yet: lower the learning rates and start again"
        return f"the last good checkpoint is {self.state_path}: lower the learning rates"

    def _save_best(self) -> None:
        student = full_student_values(self.layers, self.directory is None or not self.rank)
        if self.directory is None:
            self.best_state = {name: value.clone() for name, value in student.items()}
        elif not self.rank:
            save_state(self.directory / "best.pt", {"student": student, "model": self.digest})

    def _load_best(self) -> None:
        if self.directory is not None:
            if self.accelerator is not None:
                self.accelerator.wait_for_everyone()
            if not self.shard:
                copy_student(self.layers, load_state(self.directory / "best.pt")["student"])
        elif self.best_state is not None:
            copy_student(self.layers, self.best_state)
