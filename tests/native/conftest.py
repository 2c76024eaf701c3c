"""The compiled kernels, without torch."""

import pytest

import build


@pytest.fixture(scope="session")
def native():
    return build.load()
