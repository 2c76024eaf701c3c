"""The benchmark of kv_cache_attention: what it measures, and what it writes. No timing is judged."""

import csv

import pytest
import torch

from rcp_kernels.bench import kv_cache
from rcp_kernels.bench.kv_cache import KVCache

BENCHMARK = KVCache(attentions=((4, 2, 16), (3, 1, 7)), contexts=(5, 40), threads=(1,), rounds=1)


def test_every_case_and_peer(tmp_path):
    rows = list(BENCHMARK.measure())
    assert [tuple(row.case[name] for name in BENCHMARK.shape) for row in rows] == [
        (4, 2, 16, 5), (4, 2, 16, 40), (3, 1, 7, 5), (3, 1, 7, 40),
    ]  # fmt: skip
    for row in rows:
        case = row.case
        assert row.nbytes == 2 * case["kv_heads"] * case["context"] * ((case["head_dim"] + 1) // 2 + 4)
        assert set(row.seconds) == {kv_cache.OURS, kv_cache.READ, *BENCHMARK.peers}
        assert len(BENCHMARK.line(row)) == len(BENCHMARK.heading())
    assert len(BENCHMARK.summary(rows).splitlines()) == 1 + len(BENCHMARK.contexts)
    BENCHMARK.write_csv(rows, tmp_path / "kv.csv")
    with (tmp_path / "kv.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["context"]) for line in lines] == [5, 40, 5, 40]
    assert all(float(line[f"us {name}"]) > 0 for line in lines for name in (kv_cache.OURS, *BENCHMARK.peers))


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(kv_cache.ops, "kv_cache_attention", lambda query, *arguments: torch.zeros_like(query))
    with pytest.raises(RuntimeError, match="kv_cache_attention is off by"):
        next(BENCHMARK.measure())
