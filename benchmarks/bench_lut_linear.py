"""lut_linear and its competitors: ``pytest benchmarks/bench_lut_linear.py``."""

from rcp_kernels.bench.lut_linear import LutLinear

BENCHMARK = LutLinear()


def test_lut_linear(measure):
    """conftest.py times the call."""
