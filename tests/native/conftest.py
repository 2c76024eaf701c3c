"""The compiled kernels, without torch."""

import build
import pytest


@pytest.fixture(scope="session")
def native():
    return build.load()
