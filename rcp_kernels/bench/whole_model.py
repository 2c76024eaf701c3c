"""A whole model at batch 1 against llama.cpp: tokens a second of decoding and prefill, memory, and bytes on disk.

Every competitor starts from the same weights, those of a GGUF file or random ones. Ours are the directories that
``rcp-kernels quantize --method rtn`` writes: speed does not depend on how levels are chosen. llama.cpp's are GGUF files
in its own kinds. All competitors take turns in one process. Resident memory is measured in a process of its own for
each.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import torch

from .. import extras, hardware
from ..checkpoint import load_quantized
from ..evaluation.decoding import Decoder
from ..models.load import DEMO, find_demo_model, load_float
from ..nn.fused_decoder import fuse_decoder
from . import decode
from .gguf_files import KINDS, random_llama, requantize
from .llama_cpp import Library, LlamaCpp
from .timing import torch_threads

__all__ = ["LLAMA", "OURS", "Row", "measure", "table", "write"]

OURS = ("W2A4", "W4A8", "W3A16", "W3A8")
TORCH = ("torch bf16", "torch fp32")
LLAMA = tuple(f"llama.cpp {kind}" for kind in KINDS)

_TURN = 8  # decode steps of a turn
_CONTEXT = 128  # tokens before the first decode step
_MEMORY_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One competitor on a number of threads.

    Attributes:
        name: one of OURS, TORCH and LLAMA.
        decode, prefill: medians, tokens a second of wall time.
        decode_cpu, prefill_cpu: tokens a second of CPU time over all threads.
        disk_bytes: of the model's weight files. 0 where there is none.
        resident_bytes: resident memory of a process that decodes, beyond what it had before loading the model.
    """

    name: str
    threads: int
    decode: float
    decode_cpu: float
    prefill: float
    prefill_cpu: float
    disk_bytes: int
    resident_bytes: int


class _Model(Protocol):
    def start(self, prompt: Sequence[int]) -> None: ...

    def step(self) -> None: ...

    def set_threads(self, threads: int) -> None: ...


class _Ours:
    """A model of transformers, decoded greedily."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def start(self, prompt: Sequence[int]) -> None:
        self._decoder = Decoder(self._model, torch.tensor([list(prompt)]))

    def step(self) -> None:
        self._decoder.step()


# More than 60 lines with its docstring: one loop for each thing that is measured.
def measure(
    model: str = DEMO,
    *,
    layers: int | None = None,
    names: Sequence[str] = (*OURS, *TORCH, *LLAMA),
    threads: Sequence[int] = (1, 2),
    new_tokens: int = 64,
    prompt_tokens: int = 512,
    rounds: int = 5,
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Quantize a model for each competitor, and time all of them in turn.

    Args:
        model: "demo", a GGUF file, or a key of :data:`rcp_kernels.bench.decode.SHAPES` for random weights.
        layers: of a model with random weights; the default is all.
        names: the competitors: of OURS, TORCH and LLAMA.
        threads: numbers of threads.
        new_tokens: decode steps to time, in turns of 8, after a prompt of 128 tokens.
        prompt_tokens: tokens of the prefill.
        rounds: prefills to time.
        log: takes lines of progress.

    Raises:
        MissingExtra: llama.cpp, transformers or gguf is missing.
        ValueError: unknown competitor, or a model that is not in a GGUF file.
    """
    extras.require("transformers", "gguf", "accelerate", "safetensors")
    if model in decode.SHAPES:
        # The shape as JSON takes the place of a file's name.
        source = json.dumps(decode.SHAPES[model] | ({} if layers is None else {"num_hidden_layers": layers}))
    else:
        source = str(find_demo_model()) if model == DEMO else model
        if not source.endswith(".gguf") or layers is not None:
            raise ValueError(
                f"bench: the model to compare with llama.cpp must be demo, a .gguf file, or one of "
                f"{', '.join(decode.SHAPES)} with or without layers, got {model} and {layers} layers"
            )
    rows = []
    with tempfile.TemporaryDirectory(prefix="rcp-kernels-") as folder:
        files = {}
        for name in names:
            log(f"quantizing {name}")
            files[name] = _make(name, source, Path(folder))
        resident = {name: _resident(name, files[name], log) for name in names}
        log("loading")
        models = {name: _load(name, files[name], prompt_tokens + new_tokens + _CONTEXT) for name in names}
        for count in threads:
            log(f"timing on {count} threads")
            with torch_threads(count):
                for competitor in models.values():
                    competitor.set_threads(count)
                decoding = _decode(models, new_tokens)
                prefill = _prefill(models, prompt_tokens, rounds)
            for name in names:
                rows.append(
                    Row(name, count, *decoding[name], *prefill[name], _disk_bytes(name, files[name]), resident[name]),
                )
    return rows


def _make(name: str, source: str, folder: Path) -> str:
    """The directory, file or shape that :func:`_load` takes for a competitor."""
    if name in LLAMA:
        kind = name.removeprefix("llama.cpp ")
        out = folder / f"{kind}.gguf"
        if source.startswith("{"):
            random_llama(Library(), out, json.loads(source), kind)
        else:
            requantize(Library(), Path(source), out, kind)
        return str(out)
    if name not in (*OURS, *TORCH):
        raise ValueError(f"bench: a competitor must be one of {', '.join((*OURS, *TORCH, *LLAMA))}, got {name!r}")
    if name in TORCH or source.startswith("{"):
        return source
    from ..pipeline import Recipe, quantize

    bits, act_bits = _bits(name)
    recipe = Recipe(model=source, method="rtn", w_bits=bits, a_bits=act_bits, rotation="none", levels="uniform")
    quantize(recipe, folder / name, device="cpu")
    return str(folder / name)


def _bits(name: str) -> tuple[int, int]:
    """Bits of a weight and of an activation."""
    bits, act_bits = name.removeprefix("W").split("A")
    return int(bits), int(act_bits)


def _load(name: str, path: str, context: int) -> _Model:
    if name in LLAMA:
        return LlamaCpp(Library(), Path(path), context)
    # Ours keep in bfloat16 the parts that are not packed, if this CPU multiplies bfloat16 fast.
    half = name == "torch bf16" or (name in OURS and hardware.fast_bfloat16())
    if path.startswith("{"):
        bits, act_bits = (2, 4) if name in TORCH else _bits(name)
        builders = decode.random_builders(json.loads(path), bits, 128, act_bits)
        model = builders[decode.TORCH if name in TORCH else decode.OURS]()
    elif name in TORCH:
        model = load_float(path)[0]
    else:
        model = load_quantized(path)[0]
    model.to(torch.bfloat16 if half else torch.float32)
    if name in OURS:
        fuse_decoder(model)
    return _Ours(model)


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _rates(samples: list[tuple[float, float]], tokens: int) -> tuple[float, float]:
    """Tokens a second of wall and of CPU time, by the medians."""
    walls, cpus = zip(*samples, strict=True)
    return tokens / statistics.median(walls), tokens / statistics.median(cpus)


def _decode(models: dict[str, _Model], new_tokens: int) -> dict[str, tuple[float, float]]:
    for model in models.values():
        model.start(range(100, 100 + _CONTEXT))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(-(-new_tokens // _TURN)):
        for name, model in models.items():
            model.step()  # finds its caches cold
            samples[name].extend(_seconds(model.step) for _ in range(_TURN))
    return {name: _rates(values, 1) for name, values in samples.items()}


def _prefill(models: dict[str, _Model], tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    prompt = range(100, 100 + tokens)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            seconds = _seconds(lambda model=model: model.start(prompt))  # type: ignore[misc]
            if turn:  # the first one warms up
                samples[name].append(seconds)
    return {name: _rates(values, tokens) for name, values in samples.items()}


def _disk_bytes(name: str, path: str) -> int:
    """Bytes of the weight files; 0 for torch and for random weights, which are in no file."""
    if name in TORCH or path.startswith("{"):
        return 0
    files = [Path(path)] if Path(path).is_file() else list(Path(path).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _resident(name: str, path: str, log: Callable[[str], None]) -> int:
    log(f"memory of {name}")
    program = "import sys; from rcp_kernels.bench import whole_model; print(whole_model.decode_alone(*sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, name, path], stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def decode_alone(name: str, path: str) -> int:
    """Decode a few tokens with one competitor, and return the bytes that this process holds more than before."""
    before = _resident_now()
    model = _load(name, path, _CONTEXT + _MEMORY_TOKENS)
    model.start(range(100, 100 + _CONTEXT))
    for _ in range(_MEMORY_TOKENS):
        model.step()
    return _resident_now() - before


def _resident_now() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, with the CPU in the first line."""
    facts = hardware.conditions()
    lines = [f"# {facts['cpu']}, {facts['isa']}, torch {facts['torch']}; tokens a second, medians, in turn"]
    lines.append(f"{'':18} threads  decode  (CPU)  prefill  (CPU)  MB on disk  MB resident")
    for row in rows:
        lines.append(
            f"{row.name:18} {row.threads:7} {row.decode:7.1f} {row.decode_cpu:6.1f} {row.prefill:8.0f} "
            f"{row.prefill_cpu:6.0f} {row.disk_bytes / 1e6:11.1f} {row.resident_bytes / 1e6:12.1f}"
        )
    return "\n".join(lines)


def write(rows: Sequence[Row], folder: Path, stem: str = "whole_model") -> None:
    """Write the rows as CSV, and as a bar plot of decoding where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    if not extras.EXTRAS["matplotlib"].found:
        return
    from matplotlib.figure import Figure

    counts = sorted({row.threads for row in rows})
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(figsize=(8, 0.45 * len(names) * len(counts) + 1), layout="constrained")
    axes = figure.subplots(len(counts), 1, squeeze=False)[:, 0]
    for axis, count in zip(axes, counts, strict=True):
        speeds = {row.name: row.decode for row in rows if row.threads == count}
        colors = ["tab:orange" if name.startswith("llama") else "tab:blue" for name in speeds]
        axis.barh(list(speeds), list(speeds.values()), color=colors)
        axis.invert_yaxis()
        axis.set_title(f"{count} thread{'s' if count > 1 else ''}")
        axis.set_xlabel("tokens a second, decoding at batch 1")
    figure.savefig(folder / f"{stem}.png", dpi=150)
