"""QuantizedKVCache: size, growth, pickling and bad arguments."""

import copy
import pickle

import pytest
import torch

from rcp_kernels import ops

transformers = pytest.importorskip("transformers", reason="QuantizedKVCache is a transformers Cache")
from test_kv_cache import random, tiny_model  # noqa: E402

from rcp_kernels.nn.kv_cache import QuantizedKVCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


def test_byte_count():
    """Four bits a number, and a float16 scale and zero-point a vector: 4.5 bits at head_dim 64."""
    cache = QuantizedKVCache(capacity=1024)
    x = random(3, 2, 1024, 64)
    for layer in range(2):
        cache.update(x, x, layer)
    numbers = 2 * 2 * x.numel()
    assert cache.nbytes == numbers * 4.5 / 8
    attributes = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [t for value in attributes for t in (value if isinstance(value, tuple) else (value,))]
    held = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    assert held == cache.nbytes
    cache.update(x[:, :, :1], x[:, :, :1], 0)
    assert cache.nbytes == numbers * 4.5 / 8 * (1024 + 2 * 1024) / 2048
    odd = QuantizedKVCache(capacity=10)
    odd.update(random(1, 1, 3, 7), random(1, 1, 3, 7), 0)
    assert odd.nbytes == 2 * 10 * (4 + 4)


def test_grow_crop_reset_reorder_select():
    x = random(3, 2, 700, 32)
    expected = ops.fake_quantize_kv(x)
    cache = QuantizedKVCache(capacity=1)
    for piece in x.split([1, 300, 256, 143], dim=2):
        keys, values = cache.update(piece, -piece, 0)
    assert torch.equal(keys, expected)
    assert torch.equal(values, ops.fake_quantize_kv(-x))
    cache.crop(-200)
    assert cache.get_seq_length() == 500
    assert cache.get_mask_sizes(3, 0) == (503, 0)
    assert torch.equal(cache.dequantize(0)[0], expected[:, :, :500])
    beams = torch.tensor([2, 0, 0])
    cache.reorder_cache(beams)
    assert torch.equal(cache.dequantize(0)[0], expected[beams, :, :500])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.dequantize(0)[0], expected[beams.repeat_interleave(2), :, :500])
    cache.batch_select_indices(torch.tensor([1, 4]))
    assert torch.equal(cache.dequantize(0)[0], expected[[2, 0], :, :500])
    other = copy.deepcopy(cache)
    keys, _ = cache.update(x[:2, :, 500:], x[:2, :, 500:], 0)
    assert keys.shape[2] == 700
    assert other.get_seq_length() == 500
    cache.crop(3)
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(x[:2, :, :5], x[:2, :, :5], 0)
    assert torch.equal(keys, expected[:2, :, :5])
    storage = cache.layers[0].storage.key_codes.data_ptr()
    cache.reset()
    cache.update(x[:2], x[:2], 0)
    assert cache.layers[0].storage.key_codes.data_ptr() == storage
    cache.reset()
    keys, values = cache.update(x, -x, 0)  # another batch size
    assert torch.equal(keys, expected)
    assert torch.equal(values, ops.fake_quantize_kv(-x))


def test_a_cache_can_be_pickled():
    x = random(2, 2, 9, 32)
    cache = QuantizedKVCache(tiny_model().config)
    cache.update(x[:, :, :6], x[:, :, :6], 0)
    again = pickle.loads(pickle.dumps(cache))
    keys, _ = again.update(x[:, :, 6:], x[:, :, 6:], 0)
    assert torch.equal(keys, ops.fake_quantize_kv(x))
    assert cache.get_seq_length() == 6


def test_bad_caches():
    x = random(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"clip must be in \(0, 1\], got 1.5; 1.0 keeps"):
        QuantizedKVCache(clip=1.5)
    with pytest.raises(ValueError, match="capacity must be an int of at least 1, got 0; pass the expected"):
        QuantizedKVCache(capacity=0)
    with pytest.raises(ValueError, match="must not require grad, got some that do; call the model under"):
        QuantizedKVCache().update(x.requires_grad_(), x, 0)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3, 8\) and \(1, 2, 3, 4\)"):
            QuantizedKVCache().update(x, x[..., :4], 0)
        cache = QuantizedKVCache()
        cache.update(x, x, 0)
        with pytest.raises(ValueError, match="must have the batch and kv_heads of codes"):
            cache.update(x.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1), 0)
        with pytest.raises(ValueError, match="token 0 holds NaN"):
            cache.update(x * float("nan"), x, 0)
        # The failed call has not changed the cache.
        assert cache.get_seq_length() == 3
