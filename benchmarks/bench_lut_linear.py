"""lut_linear and its peers, case by case.

``python benchmarks/bench_lut_linear.py [options]`` is ``rcp-kernels bench``: competitors take turns, ratios come out.
``pytest benchmarks/`` runs the same cases under pytest-benchmark, which times one competitor after the other and keeps
the statistics of each; use it to follow one of them over time, not to compare two.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator

import pytest
import torch

from rcp_kernels.bench import common, lut_linear
from rcp_kernels.bench.lut_linear import (
    BATCHES,
    OURS,
    READ,
    SHAPES,
    THREADS,
    TORCH_BF16,
    TORCH_FP32,
    TORCH_INT4,
    UNIFORM,
    Peer,
)

OPTIONS = lut_linear.Options()
BUILDERS = {
    OURS: lambda n, k: lut_linear.lut_linear_peer(n, k, OPTIONS),
    UNIFORM: lambda n, k: lut_linear.lut_linear_peer(n, k, OPTIONS, "uniform"),
    READ: lambda n, k: lut_linear.read_peer(),
    TORCH_FP32: lambda n, k: lut_linear.torch_peer(n, k, torch.float32),
    TORCH_BF16: lambda n, k: lut_linear.torch_peer(n, k, torch.bfloat16),
    TORCH_INT4: lambda n, k: lut_linear.torch_int4_peer(n, k, OPTIONS.group_size),
}


# Module scope and this parameter order let pytest build the weights once for all batches and thread counts.
@pytest.fixture(
    scope="module", params=list(itertools.product(SHAPES, BUILDERS)), ids=lambda p: f"{p[0][0]}x{p[0][1]}-{p[1]}"
)
def peer(request: pytest.FixtureRequest) -> Iterator[tuple[tuple[int, int], Peer]]:
    shape, name = request.param
    yield shape, BUILDERS[name](*shape)
    gc.collect()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("batch", BATCHES)
def test_lut_linear(benchmark, peer: tuple[tuple[int, int], Peer], batch: int, threads: int) -> None:
    (out_features, in_features), competitor = peer
    benchmark.group = f"{out_features} x {in_features}, batch {batch}, threads {threads}"
    benchmark.extra_info["weight_bytes"] = competitor.weight_bytes
    with common.torch_threads(threads), torch.inference_mode():
        call = competitor.bind(batch)
        numbers = itertools.count()
        benchmark.pedantic(lambda: call(next(numbers)), rounds=OPTIONS.rounds, warmup_rounds=2)


if __name__ == "__main__":
    from rcp_kernels.cli.app import main

    sys.argv[1:1] = ["bench"]
    main()
