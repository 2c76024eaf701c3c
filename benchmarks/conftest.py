"""Runs the cases of a ``rcp-kernels bench`` benchmark under pytest-benchmark.

pytest-benchmark times one competitor after the other and keeps statistics of each. Use it to follow one competitor over
time. ``rcp-kernels bench`` compares two, because there they take turns.

A module names its benchmark BENCHMARK, and its test takes the fixture ``measure``.
"""

import gc
import itertools

import pytest
import torch

from rcp_kernels.bench import timing


def pytest_generate_tests(metafunc):
    benchmark = metafunc.module.BENCHMARK
    # Module scope: data of a shape is built once for all loads and thread counts.
    shapes = itertools.product(benchmark.shapes(), benchmark.competitors())
    metafunc.parametrize("peer", list(shapes), ids=lambda p: f"{'x'.join(map(str, p[0]))}-{p[1]}", indirect=True)
    metafunc.parametrize("load", benchmark.loads())
    metafunc.parametrize("threads", benchmark.threads)


@pytest.fixture(scope="module")
def peer(request):
    shape, name = request.param
    with torch.inference_mode():
        built = request.module.BENCHMARK.competitors()[name](*shape)
    if built is None:
        pytest.skip(f"{name} is not installed, not made for {shape}, or needs more memory than there is")
    yield shape, built
    gc.collect()


@pytest.fixture
def measure(request, benchmark, peer, load, threads):
    case = request.module.BENCHMARK
    shape, competitor = peer
    benchmark.group = f"{' x '.join(map(str, shape))}, {case.load} {load}, threads {threads}"
    benchmark.extra_info["nbytes"] = competitor.nbytes
    with timing.torch_threads(threads), torch.inference_mode():
        call = competitor.bind(case.argument(shape, load))
        numbers = itertools.count()
        iterations = timing.calls_per_turn(call)
        benchmark.pedantic(lambda: call(next(numbers)), rounds=case.rounds, iterations=iterations, warmup_rounds=1)
