"""The command ``rcp-kernels bench``."""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import extras, hardware
from ..bench import timing
from ..bench.driver import run
from ..bench.ggml import find_library
from ..bench.kv_cache import CudaKVCache, KVCache
from ..bench.lut_linear import CudaLutLinear, LutLinear
from ..bench.walsh_transform import CudaWalshTransform, WalshTransform
from .console import Device, DType, torch_dtype

__all__ = ["bench"]


class Op(str, enum.Enum):
    lut_linear = "lut_linear"
    walsh_transform = "walsh_transform"
    kv_cache = "kv_cache"


class Clock(str, enum.Enum):
    wall = "wall"
    cpu = "cpu"


class Peer(str, enum.Enum):
    llama_cpp = "llama.cpp"


class Isa(str, enum.Enum):
    scalar = "scalar"
    avx2 = "avx2"
    avx512 = "avx512"
    amx = "amx"


# Options that need --model, and options that exclude it.
_MODEL_OPTIONS = "layers context new_tokens save compile clock peer".split()
_NOT_MODEL_OPTIONS = "shape batch dtype rounds ggml".split()
# Options that exclude --peer, which compares its own list of formats.
_NOT_PEER_OPTIONS = "bits act_bits group_size context save compile clock".split()
# Options of the CPU.
_CPU_OPTIONS = "threads isa ggml peer".split()
# Options that do not apply to every op.
_OWN_OPTIONS = {
    Op.lut_linear: ["model", "bits", "act_bits", "group_size", "shape", "batch", "ggml", *_MODEL_OPTIONS],
    Op.walsh_transform: ["size", "batch"],
    Op.kv_cache: ["positions"],
}


# Longer than 60 lines: typer takes one parameter per option.
def bench(
    ctx: typer.Context,
    op: Annotated[Op, typer.Option(help="Op to time.")] = Op.lut_linear,
    device: Device = None,
    model: Annotated[
        str | None,
        typer.Option(help="Decode a whole model: demo, or llama-2-7b, llama-2-13b, llama-3-8b with random weights."),
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=4, help="Bits per weight.")] = 2,
    act_bits: Annotated[int, typer.Option(help="Bits per activation: 4, 8 or 16.")] = 4,
    group_size: Annotated[int, typer.Option(help="32, 64 or 128. Halved where it does not divide in_features.")] = 128,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Dtype of x. The default is bfloat16 for lut_linear and float32 for the other ops on the CPU, and "
            "float16 elsewhere."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="out_features x in_features, such as 4096x4096. May be repeated.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(min=2, help="--op walsh_transform: length of a row. May be repeated.")
    ] = None,
    positions: Annotated[
        list[int] | None, typer.Option(min=1, help="--op kv_cache: tokens in the cache. May be repeated.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Tokens (rows). May be repeated.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads. May be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each competitor. The median is reported.")] = 15,
    isa: Annotated[Isa | None, typer.Option(help="Force an instruction set of our kernels.")] = None,
    ggml: Annotated[
        Path | None,
        typer.Option(help="Folder with libggml-cpu. The default is llama-cpp-python, if installed.", file_okay=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV and PNG (JSON with --model).", file_okay=False)
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="--model: number of layers. The default is all.")] = None,
    context: Annotated[int, typer.Option(min=1, help="--model: tokens in the cache before the first step.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="--model: decode steps to time.")] = 16,
    save: Annotated[Path | None, typer.Option(help="--model: write the packed model there.", file_okay=False)] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="--model: also decode under torch.compile, which takes minutes.")
    ] = False,
    clock: Annotated[Clock, typer.Option(help="--model: wall, or cpu for one thread on a busy machine.")] = Clock.wall,
    peer: Annotated[
        Peer | None,
        typer.Option(
            help="--model: compare with llama.cpp (package xllamacpp): decoding, prefill, memory, disk. The model "
            "may also be a .gguf file."
        ),
    ] = None,
) -> None:
    """Time an op against torch, other libraries and the speed of memory, or a whole decoder with --model."""
    for other in set(Op) - {op}:
        _refuse(ctx, sorted(set(_OWN_OPTIONS[other]) - set(_OWN_OPTIONS[op])), f"does not apply to --op {op.value}")
    where = hardware.choose_device(device)
    if where.type != "cpu":
        _refuse(ctx, _CPU_OPTIONS, f"does not apply on {where}; pass --device cpu")
    if model is None:
        _refuse(ctx, _MODEL_OPTIONS, "applies only with --model")
    else:
        _refuse(ctx, _NOT_MODEL_OPTIONS, "does not apply with --model")
        if peer is not None:
            _refuse(ctx, _NOT_PEER_OPTIONS, "does not apply with --peer")
        elif threads is not None and len(threads) > 1:
            raise typer.BadParameter("--model takes one --threads")
    if act_bits not in (4, 8, 16):
        raise typer.BadParameter(f"--act-bits must be 4, 8 or 16, got {act_bits}")
    if group_size not in (32, 64, 128):
        raise typer.BadParameter(f"--group-size must be 32, 64 or 128, got {group_size}")
    sizes = [_shape(text) for text in shape or ()]
    if isa is not None:
        torch.ops.rcp_kernels.set_cpu_isa(hardware.ISA_NAMES.index(isa.value))
    if out is not None and model is None:
        extras.require("matplotlib")
    for folder in (out, save):
        if folder is not None:
            _make_folder(folder)
    weight = {"bits": bits, "act_bits": act_bits, "group_size": group_size}
    if model is not None and peer is not None:
        from ..bench import whole_model

        counts = tuple(threads or (1, 2))
        rows = whole_model.measure(model, layers=layers, new_tokens=new_tokens, log=_say, threads=counts)
        print(whole_model.table(rows))
        if out is not None:
            whole_model.write(rows, out)
        return
    if model is not None:
        from ..bench import decode

        with timing.torch_threads(threads[0] if threads else None):
            result = decode.measure(
                model,
                **weight,
                layers=layers,
                context=context,
                new_tokens=new_tokens,
                compiled=compile_,
                clock=clock.value,
                save=save,
                device=where,
                log=_say,
            )
        print(decode.text(result))
        if out is not None:
            path = out / f"{model}_w{bits}a{act_bits}.json"
            path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        return
    options = {"threads": threads, "rounds": rounds, "dtype": torch_dtype(dtype), "device": where}
    cpu = where.type == "cpu"
    if not cpu:
        hardware.require_kernels(where, "bench")
    if op is Op.walsh_transform:
        run((WalshTransform if cpu else CudaWalshTransform)(**_given(**options, sizes=size, rows=batch)), out)
    elif op is Op.kv_cache:
        run((KVCache if cpu else CudaKVCache)(**_given(**options, contexts=positions)), out)
    elif cpu:
        library = find_library(ggml)
        if library is None and ggml is not None:
            raise FileNotFoundError(f"no libggml-cpu*.so below {ggml}")
        run(LutLinear(**_given(**options, **weight, sizes=sizes, batches=batch, ggml=library)), out)
    else:
        run(CudaLutLinear(**_given(**options, **weight, sizes=sizes, batches=batch)), out)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _refuse(ctx: typer.Context, names: list[str], why: str) -> None:
    """Usage error if any of these options was given, because none may be ignored silently."""
    for name in names:
        parameter = "compile_" if name == "compile" else name
        source = ctx.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given a value, lists as tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value not in (None, [])
    }


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--shape must be out_features x in_features, such as 4096x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


def _make_folder(path: Path) -> None:
    """Create the folder before minutes of measuring, not after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot create folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise typer.BadParameter(f"cannot write into folder {path}")
