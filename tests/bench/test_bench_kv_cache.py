"""The benchmark of kv_cache_attention: what it measures, and what it writes. No timing is judged."""

import csv

import pytest
import torch

from rcp_kernels.bench import common, kv_cache

OPTIONS = kv_cache.Options(shapes=((4, 2, 16), (3, 1, 7)), contexts=(5, 40), threads=(1,), rounds=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(common, "rotated_bytes", lambda: 1 << 16)


def test_every_case_and_peer(tmp_path):
    rows = list(kv_cache.measure(OPTIONS))
    assert [(row.heads, row.kv_heads, row.head_dim, row.context) for row in rows] == [
        (4, 2, 16, 5), (4, 2, 16, 40), (3, 1, 7, 5), (3, 1, 7, 40),
    ]  # fmt: skip
    for row in rows:
        assert row.cache_bytes == 2 * row.kv_heads * row.context * ((row.head_dim + 1) // 2 + 4)
        assert set(row.seconds) == {kv_cache.OURS, kv_cache.READ, *kv_cache.PEERS}
        assert len(kv_cache.line(row)) == len(kv_cache.titles())
    assert len(kv_cache.summary(rows).splitlines()) == 1 + len(OPTIONS.contexts)
    kv_cache.write_csv(rows, OPTIONS, tmp_path / "kv.csv")
    with (tmp_path / "kv.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["context"]) for line in lines] == [5, 40, 5, 40]
    assert all(float(line[f"us {name}"]) > 0 for line in lines for name in (kv_cache.OURS, *kv_cache.PEERS))


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(kv_cache.ops, "kv_cache_attention", lambda query, *arguments: torch.zeros_like(query))
    with pytest.raises(RuntimeError, match="kv_cache_attention is off by"):
        next(kv_cache.measure(OPTIONS))
