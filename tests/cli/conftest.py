"""A tiny model and a text for the tests of the command line."""

import pytest
from language_of_numbers import write_model, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "numbers.txt")
