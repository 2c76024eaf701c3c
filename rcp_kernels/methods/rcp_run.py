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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from ..models import Architecture, describe
from ..nn.online_rotation import OnlineRotation
from .block_reconstruction import BlockState, reconstruct_blocks, schedule
from .distillation import Head, distillation_loss, mean_confidence, reverse_weight
from .rcp_config import RcpConfig
from .student import FakeQuantKV, FakeQuantLinear, held, make_student, students
from .training_state import LogFile, load_state, save_state

__all__ = [
    "Diverged",
    "Run",
    "TrainResult",
    "copy_student",
    "model_digest",
    "start_student",
    "student_perplexity",
]

_CONFIDENCE_BATCHES = 10
_CHUNK = 256


class Diverged(RuntimeError):
    """Training met a loss that is not finite; the last checkpoint is as it was."""


@dataclass
class TrainResult:
    """What :func:`train` did.

    Attributes:
        steps: updates made, those before a resume included.
        tokens: trained on in phase two.
        best_step: with the lowest validation perplexity; the student has its weights.
        best_perplexity: on the validation windows.
        confidence: mean largest probability of the teacher: CAKLD's m.
        cpu_seconds: of this process, those before a resume included.
    """

    steps: int
    tokens: int
    best_step: int
    best_perplexity: float
    confidence: float
    cpu_seconds: float


def student_perplexity(
    decoder: Callable[[Tensor], Tensor],
    head: Head,
    windows: Tensor,
    run: Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]] = lambda f, items: list(map(f, items)),
) -> float:
    """exp of the mean negative log-likelihood of the windows' tokens, the first of each excepted.

    Args:
        decoder: int64 [1, tokens] -> hidden states [tokens, hidden_size] after the final norm.
        head: of the model.
        windows: int64 [windows, tokens].
        run: a map, which may use threads.
    """

    @torch.no_grad()
    def loss(window: Tensor) -> float:
        total = 0.0
        hidden = decoder(window.unsqueeze(0))[:-1]
        for part, target in zip(hidden.split(_CHUNK), window[1:].split(_CHUNK), strict=True):
            total += functional.cross_entropy(head.logits(part), target, reduction="sum").item()
        return total

    return math.exp(sum(run(loss, windows)) / (windows.shape[0] * (windows.shape[1] - 1)))


def model_digest(model: nn.Module) -> str:
    """Tells one float model, and one rotation of it, from another: sha256, hexadecimal.

    Of every parameter's name, dtype, shape and the sum of the bits of each row, which no order of summation changes;
    and of every rotation that runs online: where it is, its state and signs.
    """
    digest = hashlib.sha256()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        bits = parameter.detach().view(integers[parameter.element_size()])
        digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, OnlineRotation):
            signs = None if module.signs is None else module.signs.tolist()
            digest.update(f"{name} {module.state().tolist()} {signs}".encode())
    return digest.hexdigest()


def start_student(model: nn.Module, config: RcpConfig, init: str) -> Architecture:
    """:func:`make_student` with the settings of a training."""
    return make_student(
        model,
        bits=config.bits,
        group_size=config.group_size,
        act_bits=config.act_bits,
        act_clip=config.act_clip,
        init=init,
        learn_clip=config.learn_clip,
        learn_partition=config.learn_partition,
    )


def _student_values(layers: list[FakeQuantLinear]) -> dict[str, Tensor]:
    """What training changes, and the buffers that stand for what it does not, by name."""
    return {
        f"{layer.name}.{name}": value.detach()
        for layer in layers
        for name, value in (*layer.named_parameters(), *layer.quantizer.named_buffers(prefix="quantizer"))
    }


def copy_student(layers: list[FakeQuantLinear], state: Mapping[str, Tensor]) -> None:
    """Give layers the values of a checkpoint, in place; ValueError if it is of another model."""
    with torch.no_grad():
        for name, value in _student_values(layers).items():
            if name not in state or state[name].shape != value.shape:
                raise ValueError(
                    f"train: the checkpoint must have {name} of shape {list(value.shape)}; it is another's"
                )
            value.copy_(_like(state[name], value))


def _full(value: Tensor) -> Tensor:
    """The whole of a tensor that may be split over processes, all of which have to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, split as another is."""
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def _finite(value: Tensor) -> bool:
    """Whether all of it, or of this process's part, is finite."""
    part = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(part).all())


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
        self._check()
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.teacher = (
            (copy.deepcopy(model) if teacher is None else teacher).to(self.dtype).eval().requires_grad_(False)
        )
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

    def _check(self) -> None:
        config = self.config
        if config.batch % (config.micro_batch * self.ranks):
            raise ValueError(
                f"train: batch must be a multiple of micro_batch times the processes, got {config.batch} and "
                f"{config.micro_batch} x {self.ranks}; change one of them"
            )
        if self.shard and (self.accelerator is None or self.directory is None):
            raise ValueError(
                f"train: shard needs an accelerator and a directory, got {self.accelerator} and {self.directory}; pass "
                f"both, or shard=False"
            )
        for name, windows in (("training", self.training), ("validation", self.validation)):
            if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
                raise ValueError(
                    f"train: {name} must be int64 [windows, tokens] with a window at least, got shape "
                    f"{tuple(windows.shape)}; pass more text or shorter windows"
                )

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
        return {name: _full(value) for name, value in _student_values(self.layers).items()}

    def _optimizer_state(self) -> dict[str, Any] | None:
        if self.optimizer is None:
            return None
        state = self.optimizer.state_dict()
        whole = {
            index: {name: _full(value) for name, value in entry.items()} for index, entry in state["state"].items()
        }
        return {**state, "state": whole}

    def _begin_phase_two(self) -> None:
        """Make the optimizer, of parameters that are split over the processes before if they are to be."""
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
            split = {
                index: {
                    name: _like(value, self.parameters[index]) if value.dim() else value
                    for name, value in entry.items()
                }
                for index, entry in self.optimizer_state["state"].items()
            }
            self.optimizer.load_state_dict({**self.optimizer_state, "state": split})
            self.optimizer_state = None

    def _held(self) -> contextlib.AbstractContextManager[None]:
        """Weights quantized once for several passes; where they are split, each layer's exist only while it runs."""
        return contextlib.nullcontext() if self.shard else held(self.model, self.dtype, self._map)

    def _save(self) -> None:
        if self.state_path is None:
            return
        # The checkpoint that is there must not give way to one that cannot be gone on from.
        for layer in self.layers:
            if not all(_finite(value) for value in layer.parameters()):
                raise Diverged(
                    f"train: weights must be finite, got NaN or Inf after step {self.step} in layer {layer.name}; "
                    f"{self._last_good()}"
                )
        block = self.block_state
        student, optimizer = self._student_state(), self._optimizer_state()
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
        output = decoder(input_ids=ids.to(self.device), past_key_values=cache, use_cache=False)
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
        norm = _full(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
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

    @torch.no_grad()
    def _first_bad_layer(self, ids: Tensor) -> str:
        """Where it began: a weight, else the first output, else the gradient nearest to the loss that is not finite."""
        bad: list[str] = []

        def watch(layer: FakeQuantLinear) -> Any:
            def check(module: nn.Module, args: Any, output: Tensor) -> None:
                if not bool(torch.isfinite(output).all()):
                    bad.append(layer.name)

            return layer.register_forward_hook(check)

        for layer in self.layers:
            if not all(_finite(value) for value in layer.parameters()):
                return layer.name
        handles = [watch(layer) for layer in self.layers]
        with contextlib.suppress(ValueError):  # what refuses NaN comes after the layer that gave it
            self._student(ids)
        for handle in handles:
            handle.remove()
        for layer in reversed(self.layers):
            if not all(_finite(p.grad) for p in layer.parameters() if p.grad is not None):
                bad.append(layer.name)
        return bad[0] if bad else self.architecture.head

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
