"""The public names that users import. A release may add names; it must not lose one of tests/public_names.txt."""

import ast
import importlib
from pathlib import Path

import pytest

import rcp_kernels

NAMES = (Path(__file__).parent / "public_names.txt").read_text().split()
# Importing these needs a package that the tests do not install.
NOT_IMPORTED = {"rcp_kernels.integrations.vllm": "integrations/vllm.py"}


def public_names(module):
    """``__all__`` of a module, read from its source where it cannot be imported."""
    if module not in NOT_IMPORTED:
        found = importlib.import_module(module)
        return [name for name in found.__all__ if hasattr(found, name)]
    source = (Path(rcp_kernels.__file__).parent / NOT_IMPORTED[module]).read_text()
    lists = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    return lists[0]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name):
    module, _, attribute = name.rpartition(".")
    assert attribute in public_names(module)


def test_the_command_line_has_its_entry_point():
    assert callable(importlib.import_module("rcp_kernels.cli").main)
