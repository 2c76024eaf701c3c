"""kv_cache_attention and its peers, case by case.

``python benchmarks/bench_kv_cache.py [options]`` is ``rcp-kernels bench --op kv_cache``: competitors take turns, ratios
come out. ``pytest benchmarks/`` runs the same cases under pytest-benchmark, which times one competitor after the other
and keeps the statistics of each; use it to follow one of them over time, not to compare two.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator

import pytest
import torch

from rcp_kernels.bench import common, kv_cache
from rcp_kernels.bench.kv_cache import CONTEXTS, SHAPES, THREADS, Peer

OPTIONS = kv_cache.Options()
BUILDERS = kv_cache.builders(OPTIONS)


# Module scope and this parameter order let pytest build the caches once for all thread counts.
@pytest.fixture(
    scope="module",
    params=list(itertools.product(SHAPES, CONTEXTS, BUILDERS)),
    ids=lambda p: f"{'x'.join(map(str, p[0]))}-{p[1]}-{p[2]}",
)
def peers(request: pytest.FixtureRequest) -> Iterator[list[Peer]]:
    shape, context, name = request.param
    with torch.inference_mode():
        yield BUILDERS[name](*shape, context)
    gc.collect()


@pytest.mark.parametrize("threads", THREADS)
def test_kv_cache_attention(benchmark, peers: list[Peer], threads: int) -> None:
    competitor = peers[0]
    benchmark.extra_info["cache_bytes"] = competitor.cache_bytes
    with common.torch_threads(threads), torch.inference_mode():
        numbers = itertools.count()
        benchmark.pedantic(lambda: competitor.call(next(numbers)), rounds=OPTIONS.rounds, warmup_rounds=2)


if __name__ == "__main__":
    from rcp_kernels.cli.app import main

    sys.argv[1:1] = ["bench", "--op", "kv_cache"]
    main()
