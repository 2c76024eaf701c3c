"""kv_cache and its competitors: ``pytest benchmarks/bench_kv_cache.py``."""

from rcp_kernels.bench.kv_cache import KVCache

BENCHMARK = KVCache()


def test_kv_cache(measure):
    """conftest.py times the call."""
