"""How competitors are timed: copies that outgrow the cache, turns, and budgets."""

import pytest
import torch

from rcp_kernels import hardware
from rcp_kernels.bench import timing


def test_plain_read_reads_all():
    buffer = torch.arange(10_007, dtype=torch.int64)
    assert timing.plain_read(buffer) == buffer.sum()


def test_copies_outgrow_the_cache(monkeypatch):
    monkeypatch.undo()
    assert timing.rotated_bytes() >= max(256 << 20, 4 * hardware.last_level_cache_bytes())
    assert timing.copies_needed(10**12) == 2
    assert timing.copies_needed(1 << 20) * (1 << 20) >= timing.rotated_bytes()


def test_median_seconds_takes_turns():
    order = []
    seconds = timing.median_seconds({name: lambda i, name=name: order.append((name, i)) for name in "ab"}, rounds=3)
    assert set(seconds) == {"a", "b"}
    assert all(value > 0 for value in seconds.values())
    # every call number once, so that each competitor walks through all its copies
    for name in "ab":
        numbers = [i for who, i in order if who == name]
        assert numbers == list(range(len(numbers)))
    turns = [name for k, (name, _) in enumerate(order) if k == 0 or order[k - 1][0] != name]
    assert turns == ["a", "b"] * 4


def test_a_slow_competitor_takes_three_turns_and_no_more(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    turns = []

    def call(name, seconds):
        turns.append(name)
        clock[0] += seconds

    calls = {"slow": lambda i: call("slow", 0.5), "fast": lambda i: call("fast", 0.01)}
    seconds = timing.median_seconds(calls, rounds=10, budget=1.0)
    assert seconds == pytest.approx({"slow": 0.5, "fast": 0.01})
    # two calls to plan, and two in each turn: one that wakes the threads and one that counts
    assert turns.count("slow") == 2 + 3 * 2
    assert turns.count("fast") == 2 + 10 * 2


def test_torch_threads_are_put_back():
    before = torch.get_num_threads()

    def fail():
        with timing.torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
