"""Tiny models of every family, their logits, and one thread, for the tests of rotations."""

import pytest
import torch
from rotated_models import NAMES, logits, make_model
from torch import nn


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: make_model(name) for name in NAMES}


@pytest.fixture(scope="module")
def expected(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: logits(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def one_thread():
    # With more threads, models this small spend their time waiting.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
