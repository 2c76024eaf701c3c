"""walsh_transform and its competitors: ``pytest benchmarks/bench_walsh_transform.py``."""

from rcp_kernels.bench.walsh_transform import WalshTransform

BENCHMARK = WalshTransform()


def test_walsh_transform(measure):
    """conftest.py times the call."""
