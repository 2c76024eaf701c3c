"""The emulated device is one on which mistakes of devices show."""

import copy

import pytest
import torch
from emulated_device import extension


@pytest.fixture
def emulated(device):
    if device.type != "emulated":
        pytest.skip("tests of the emulation")
    return device


def test_an_operator_that_mixes_devices_raises(emulated):
    table = torch.nn.Embedding(5, 3).to(emulated)
    with pytest.raises(RuntimeError, match="same device"):
        table(torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=emulated) + torch.ones(2)
    assert table(torch.tensor([1, 2], device=emulated)).device == emulated


def test_results_are_those_of_the_cpu(emulated):
    layer = torch.nn.Linear(8, 6)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    found = layer.to(emulated)(x.to(emulated))
    assert found.device == emulated
    torch.testing.assert_close(found.cpu(), expected)  # not bit-equal: torch may choose another route to the product
    assert torch.nn.functional.smooth_l1_loss(found, found.detach() + 1).item() == 0.5
    found.square().sum().backward()
    assert layer.weight.grad.device == emulated


def test_copies_views_and_in_place_operators(emulated):
    x = torch.arange(12.0, device=emulated).reshape(3, 4)
    assert torch.equal(x.t().contiguous().cpu(), torch.arange(12.0).reshape(3, 4).t())
    x[1].fill_(0)
    x[:, 2].add_(1)
    assert x.cpu().tolist() == [[0, 1, 3, 3], [0, 0, 1, 0], [8, 9, 11, 11]]
    twin = copy.deepcopy(torch.nn.Linear(3, 2).to(emulated))
    assert twin.weight.device == emulated
    assert torch.equal(copy.deepcopy(x).cpu(), x.cpu())
    assert x.expand(2, 2, 3, 4).reshape(4, 3, 4).stride() == (0, 4, 1)


def test_memory_is_counted(emulated):
    before = extension().memory_allocated()
    extension().reset_peak_memory_stats()
    x = torch.zeros(1000, device=emulated)
    y = torch.zeros(500, device=emulated)
    assert extension().memory_allocated() - before == 6000
    del x, y
    assert extension().memory_allocated() == before
    assert torch.get_device_module(emulated).max_memory_allocated() - before == 6000
