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

__all__ = ["bench"]


class DType(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Op(str, enum.Enum):
    lut_linear = "lut_linear"
    walsh_transform = "walsh_transform"
    kv_cache = "kv_cache"


class Device(str, enum.Enum):
    cpu = "cpu"
    cuda = "cuda"


class Isa(str, enum.Enum):
    scalar = "scalar"
    avx2 = "avx2"
    avx512 = "avx512"
    amx = "amx"


# Options of `bench` that only --model has, and those that it has not.
_MODEL_OPTIONS = "layers context new_tokens save".split()
_NOT_MODEL_OPTIONS = "shape batch dtype rounds ggml".split()
# Options of `bench` that mean nothing on a GPU, where a CUDA graph runs by itself.
_NOT_CUDA_OPTIONS = "model threads isa ggml".split()
# The options of `bench` that do not apply to every op.
_OWN_OPTIONS = {
    Op.lut_linear: "device model bits act_bits group_size shape batch ggml layers context new_tokens save".split(),
    Op.walsh_transform: ["size", "batch"],
    Op.kv_cache: ["positions"],
}


def bench(
    ctx: typer.Context,
    op: Annotated[Op, typer.Option(help="What to time.")] = Op.lut_linear,
    device: Annotated[
        Device, typer.Option(help="cuda: on the GPU, beside cuBLAS and low-bit kernels that are installed.")
    ] = Device.cpu,
    model: Annotated[
        str | None,
        typer.Option(
            help="Decode a whole model of this shape with random weights: llama-2-7b, llama-2-13b, llama-3-8b."
        ),
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=4)] = 2,
    act_bits: Annotated[int, typer.Option(help="4, 8 or 16.")] = 4,
    group_size: Annotated[int, typer.Option(help="32, 64 or 128; halved where it does not divide in_features.")] = 128,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of x; without it bfloat16 for lut_linear, float16 on cuda, and float32 for the others."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="out_features x in_features, such as 4096x4096; may be repeated.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(min=2, help="--op walsh_transform: length of a row; may be repeated.")
    ] = None,
    positions: Annotated[
        list[int] | None, typer.Option(min=1, help="--op kv_cache: tokens in the cache; may be repeated.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Tokens (rows); may be repeated.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each competitor; the median counts.")] = 15,
    isa: Annotated[Isa | None, typer.Option(help="Force an instruction set of our kernels.")] = None,
    ggml: Annotated[
        Path | None,
        typer.Option(
            help="Folder with libggml-cpu, for ggml as a peer; an installed llama-cpp-python is found.", file_okay=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV and PNG (JSON with --model).", file_okay=False)
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="--model: only so many layers.")] = None,
    context: Annotated[int, typer.Option(min=1, help="--model: tokens already in the cache.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="--model: decode steps timed.")] = 16,
    save: Annotated[Path | None, typer.Option(help="--model: write the packed model there.", file_okay=False)] = None,
) -> None:
    """Time an op against torch, other libraries and the speed of memory, or a whole decoder with --model."""
    for other in set(Op) - {op}:
        _refuse(ctx, sorted(set(_OWN_OPTIONS[other]) - set(_OWN_OPTIONS[op])), f"does not apply to --op {op.value}")
    if device is Device.cuda:
        _refuse(ctx, _NOT_CUDA_OPTIONS, "does not apply with --device cuda")
    if model is None:
        _refuse(ctx, _MODEL_OPTIONS, "applies only with --model")
    else:
        _refuse(ctx, _NOT_MODEL_OPTIONS, "does not apply with --model")
        if threads is not None and len(threads) > 1:
            raise typer.BadParameter("--model takes one --threads")
    if act_bits not in (4, 8, 16):
        raise typer.BadParameter(f"--act-bits must be 4, 8 or 16, got {act_bits}")
    if group_size not in (32, 64, 128):
        raise typer.BadParameter(f"--group-size must be 32, 64 or 128, got {group_size}")
    shapes = [_shape(text) for text in shape or ()]
    if isa is not None:
        torch.ops.rcp_kernels.set_cpu_isa(hardware.ISA_NAMES.index(isa.value))
    if out is not None and model is None:
        extras.require("matplotlib")
    for folder in (out, save):
        if folder is not None:
            _make_folder(folder)
    if model is not None:
        _bench_model(model, bits, act_bits, group_size, threads, out, layers, context, new_tokens, save)
        return
    overrides = {
        "threads": threads,
        "rounds": rounds,
        "dtype": getattr(torch, dtype.value) if dtype else None,
    }
    if op is Op.walsh_transform:
        _bench_walsh_transform(_given(**overrides, sizes=size, rows=batch), out)
    elif op is Op.kv_cache:
        _bench_kv_cache(_given(**overrides, contexts=positions), out)
    else:
        overrides |= {"bits": bits, "act_bits": act_bits, "group_size": group_size, "shapes": shapes, "batches": batch}
        if device is Device.cuda:
            _bench_lut_linear_cuda(_given(**overrides), out)
        else:
            _bench_lut_linear(_given(**overrides), ggml, out)


def _refuse(ctx: typer.Context, names: list[str], why: str) -> None:
    """Usage error if any of these options was given: an option is not ignored without a word."""
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given a value, lists as tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value not in (None, [])
    }


def _bench_lut_linear(options: dict[str, Any], ggml_folder: Path | None, out: Path | None) -> None:
    from ..bench import lut_linear
    from ..bench.ggml import Ggml, find_library

    library = find_library(ggml_folder)
    if library is None and ggml_folder is not None:
        raise FileNotFoundError(f"no libggml-cpu*.so below {ggml_folder}")
    case = lut_linear.Options(**options)
    print(lut_linear.header(case))
    print(f"# ggml: {library}" if library else f"# ggml not installed: {extras.EXTRAS['llama_cpp'].install}")
    print(lut_linear.titles(), flush=True)
    rows = []
    for row in lut_linear.measure(case, Ggml(library) if library else None):
        rows.append(row)
        print(lut_linear.line(row), flush=True)
    print(lut_linear.summary(rows))
    if out is not None:
        stem = f"lut_linear_w{case.bits}a{case.act_bits}_{hardware.cpu_isa()}"
        lut_linear.write_csv(rows, case, out / f"{stem}.csv")
        lut_linear.write_plot(rows, case, out / f"{stem}.png")


def _bench_lut_linear_cuda(options: dict[str, Any], out: Path | None) -> None:
    from ..bench import lut_linear_cuda

    reason = lut_linear_cuda.missing()
    if reason is not None:
        print(reason)
        return
    case = lut_linear_cuda.Options(**options)
    print(lut_linear_cuda.header(case))
    print(lut_linear_cuda.titles(), flush=True)
    rows = []
    for row in lut_linear_cuda.measure(case):
        if isinstance(row, str):
            print(row, flush=True)
            continue
        rows.append(row)
        print(lut_linear_cuda.line(row), flush=True)
    if out is not None:
        lut_linear_cuda.write_csv(rows, case, out / f"lut_linear_w{case.bits}a{case.act_bits}_cuda.csv")


def _bench_walsh_transform(options: dict[str, Any], out: Path | None) -> None:
    from ..bench import walsh_transform

    case = walsh_transform.Options(**options)
    print(walsh_transform.header(case))
    print(walsh_transform.titles(), flush=True)
    rows = []
    for row in walsh_transform.measure(case):
        rows.append(row)
        print(walsh_transform.line(row), flush=True)
    print(walsh_transform.summary(rows))
    if out is not None:
        stem = f"walsh_transform_{str(case.dtype).removeprefix('torch.')}_{hardware.cpu_isa()}"
        walsh_transform.write_csv(rows, case, out / f"{stem}.csv")
        walsh_transform.write_plot(rows, case, out / f"{stem}.png")


def _bench_kv_cache(options: dict[str, Any], out: Path | None) -> None:
    from ..bench import kv_cache

    case = kv_cache.Options(**options)
    print(kv_cache.header(case))
    print(kv_cache.titles(), flush=True)
    rows = []
    for row in kv_cache.measure(case):
        rows.append(row)
        print(kv_cache.line(row), flush=True)
    print(kv_cache.summary(rows))
    if out is not None:
        stem = f"kv_cache_{str(case.dtype).removeprefix('torch.')}_{hardware.cpu_isa()}"
        kv_cache.write_csv(rows, case, out / f"{stem}.csv")
        kv_cache.write_plot(rows, case, out / f"{stem}.png")


def _bench_model(
    model: str,
    bits: int,
    act_bits: int,
    group_size: int,
    threads: list[int] | None,
    out: Path | None,
    layers: int | None,
    context: int,
    new_tokens: int,
    save: Path | None,
) -> None:
    from ..bench import decoder

    if threads:
        torch.set_num_threads(threads[0])
    result = decoder.measure(
        model,
        layers=layers,
        bits=bits,
        act_bits=act_bits,
        group_size=group_size,
        context=context,
        new_tokens=new_tokens,
        save=save,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(decoder.text(result))
    if out is not None:
        path = out / f"{model}_w{bits}a{act_bits}.json"
        path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--shape must be out_features x in_features, such as 4096x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


def _make_folder(path: Path) -> None:
    """Create it before minutes of measuring, not after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot create folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise typer.BadParameter(f"cannot write into folder {path}")
