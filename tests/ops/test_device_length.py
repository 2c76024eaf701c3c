"""Operators of the key-value caches that read the number of positions from a tensor: the bits of the plain call."""

import pytest
import torch
from test_decode_attention import case
from test_kv_cache import FLOATS, filled, random

from rcp_kernels import ops

STEPS = 5


def held(number, device="cpu"):
    return torch.tensor(number, device=device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 1, 250])
def test_append_from_held(dtype, place):
    x = random(2, 3, 4, 33, dtype=dtype)
    found, expected = ops.empty_kv_cache(2, 3, 256, 33), ops.empty_kv_cache(2, 3, 256, 33)
    ops.kv_cache_append(x, *expected, place + 2, 0.9)
    for append in (ops.kv_cache_append, ops.reference.kv_cache_append):
        append(x, *found, 2, 0.9, held(place))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for tensor in found:
            tensor.zero_()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [3, 256, 257, 600])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_held_positions(dtype, length, window, masked):
    """The mask has the width of the storage. What it says beyond the positions held does not count."""
    storage = filled(random(2, 2, length, 32), random(2, 2, length, 32, seed=1), 600)
    query = random(2, 6, 3, 32, dtype=dtype, seed=2)
    mask = random(2, 1, 3, 600, seed=3) < 0.5 if masked else None
    narrow = None if mask is None else mask[..., :length]
    expected = ops.kv_cache_attention(query, storage, length, 0.2, True, window, narrow)
    assert torch.equal(ops.kv_cache_attention(query, storage, 3, 0.2, True, window, mask, held(length - 3)), expected)
    exact = ops.reference.kv_cache_attention(query, storage, 3, 0.2, True, window, mask, held(length - 3))
    assert (expected.double() - exact).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_attention_from_held(dtype):
    qkv, cos, sin, *storage = case(2, 2, 3, 16, 7, 9, dtype, 0)
    found, expected = ([x.clone() for x in storage] for _ in range(2))
    y = ops.decode_attention(qkv, cos, sin, *expected, 7, 0.25)
    assert torch.equal(ops.decode_attention(qkv, cos, sin, *found, 0, 0.25, held(7)), y)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(found, expected, strict=True))
    exact = ops.reference.decode_attention(qkv, cos, sin, *found, 0, 0.25, held(7))
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_length(backend):
    def step(x, query, length, *storage):
        ops.kv_cache_append(x, *storage[:2], 0, 1.0, length)
        ops.kv_cache_append(-x, *storage[2:], 0, 1.0, length)
        return ops.kv_cache_attention(query, ops.KVStorage(*storage), 1, held=length) + 1

    eager = filled(random(1, 2, 250, 32), random(1, 2, 250, 32, seed=1), 260)
    traced = [x.clone() for x in eager]
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for i in range(STEPS):
        x, query = random(1, 2, 1, 32, seed=2 + i), random(1, 4, 1, 32, seed=3 + i)
        ops.kv_cache_append(x, *eager[:2], 250 + i)
        ops.kv_cache_append(-x, *eager[2:], 250 + i)
        expected = ops.kv_cache_attention(query, eager, 251 + i) + 1
        assert torch.equal(compiled(x, query, held(250 + i), *traced), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    storage = filled(random(2, 2, 5, 7), random(2, 2, 5, 7), 6)
    op = torch.ops.rcp_kernels
    x = random(2, 2, 1, 7, dtype=dtype)
    torch.library.opcheck(op.kv_cache_append.default, (x, *storage[:2], 0, 0.95, held(5)))
    query, mask = random(2, 6, 2, 7, dtype=dtype), torch.ones(2, 1, 2, 6, dtype=torch.bool)
    torch.library.opcheck(op.kv_cache_attention.default, (query, *storage, 0, 0.3, False, 3, mask, held(5)))
    arguments = case(2, 2, 3, 8, 9, 10, dtype, 0)
    for tensor in arguments[3:]:
        tensor.nan_to_num_()
    torch.library.opcheck(op.decode_attention.default, (*arguments, 0, 0.5, held(9)))


def test_on_another_device(device):
    storage = filled(random(1, 2, 9, 32), random(1, 2, 9, 32, seed=1), 12)
    there = ops.KVStorage(*(x.to(device) for x in storage))
    x, query = random(1, 2, 1, 32, seed=2), random(1, 4, 1, 32, seed=3)
    ops.kv_cache_append(x, *storage[:2], 9)
    ops.kv_cache_append(x.to(device), *there[:2], 0, 1.0, held(9, device))
    assert torch.equal(there[0].cpu(), storage[0])
    ops.kv_cache_append(x, *storage[2:], 9)
    ops.kv_cache_append(x.to(device), *there[2:], 0, 1.0, held(9, device))
    found = ops.kv_cache_attention(query.to(device), there, 1, held=held(9, device))
    torch.testing.assert_close(found.cpu(), ops.kv_cache_attention(query, storage, 10), rtol=1e-5, atol=1e-5)
    if device.type == "cuda":  # the emulated device takes numbers of the CPU, as most operators do on a card
        with pytest.raises(ValueError, match="held must be"):
            ops.kv_cache_append(x.to(device), *there[:2], 0, 1.0, held(9))


def test_a_full_cache_names_its_capacity():
    storage = filled(random(1, 2, 4, 8), random(1, 2, 4, 8), 4)
    with pytest.raises(ValueError, match=r"position \+ tokens must be 1 to 4, got 5; .* larger capacity"):
        ops.kv_cache_append(random(1, 2, 1, 8), *storage[:2], 0, 1.0, held(4))
    with pytest.raises(ValueError, match="length must be 0 to 4, got 5"):
        ops.kv_cache_attention(random(1, 2, 1, 8), storage, 1, held=held(4))
    arguments = case(1, 1, 1, 8, 9, 9, torch.float32, 0)
    with pytest.raises(ValueError, match=r"capacity - 1 \(8\), got 9; .* larger capacity"):
        ops.decode_attention(*arguments, 0, 0.5, held(9))


@pytest.mark.parametrize("bad", [torch.tensor([1]), torch.tensor(1, dtype=torch.int32), torch.tensor(1.0)])
def test_bad_held(bad):
    storage = filled(random(1, 2, 4, 8), random(1, 2, 4, 8), 4)
    x = random(1, 2, 1, 8)
    for module in (ops, ops.reference):
        with pytest.raises(ValueError, match="held must be int64 without dimensions"):
            module.kv_cache_append(x, *storage[:2], 0, 1.0, bad)
        with pytest.raises(ValueError, match="held must be int64 without dimensions"):
            module.kv_cache_attention(x, storage, 1, held=bad)
    with pytest.raises(ValueError, match="held must be int64 without dimensions"):
        ops.decode_attention(*case(1, 1, 1, 8, 2, 9, torch.float32, 0), 0, 0.5, bad)
