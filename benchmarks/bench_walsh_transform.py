"""walsh_transform and its peers, case by case.

``python benchmarks/bench_walsh_transform.py [options]`` is ``rcp-kernels bench --op walsh_transform``: competitors take
turns, ratios come out. ``pytest benchmarks/`` runs the same cases under pytest-benchmark, which times one competitor
after the other and keeps the statistics of each; use it to follow one of them over time, not to compare two.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator

import pytest
import torch

from rcp_kernels.bench import common, walsh_transform
from rcp_kernels.bench.walsh_transform import ROWS, SIZES, THREADS, Peer

OPTIONS = walsh_transform.Options()
BUILDERS = walsh_transform.builders(OPTIONS)


# Module scope and this parameter order let pytest build a dense matrix once for all row and thread counts.
@pytest.fixture(scope="module", params=list(itertools.product(SIZES, BUILDERS)), ids=lambda p: f"{p[0]}-{p[1]}")
def peer(request: pytest.FixtureRequest) -> Iterator[tuple[int, Peer]]:
    size, name = request.param
    built = BUILDERS[name](size)
    if built is None:
        pytest.skip(f"{name} is not installed, cannot do {size}, or needs more memory than there is")
    yield size, built
    gc.collect()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("rows", ROWS)
def test_walsh_transform(benchmark, peer: tuple[int, Peer], rows: int, threads: int) -> None:
    size, competitor = peer
    benchmark.group = f"n {size}, rows {rows}, threads {threads}"
    with common.torch_threads(threads), torch.inference_mode():
        call = walsh_transform.bind_checked(competitor, torch.randn(rows, size).to(OPTIONS.dtype))
        iterations = common.calls_per_turn(call)
        benchmark.pedantic(call, (0,), rounds=OPTIONS.rounds, iterations=iterations)


if __name__ == "__main__":
    from rcp_kernels.cli.app import main

    sys.argv[1:1] = ["bench", "--op", "walsh_transform"]
    main()
