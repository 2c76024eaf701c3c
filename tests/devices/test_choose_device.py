"""Devices by name."""

from pathlib import Path

import pytest
import torch

from rcp_kernels.hardware import choose_device, fast_bfloat16, to_device_of


def test_a_test_that_asks_for_no_device_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cpu")


@pytest.mark.usefixtures("device")
def test_the_default_is_a_gpu_where_there_is_one(monkeypatch):
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda")


def test_a_device_is_taken_by_name(device):
    assert choose_device(str(device)) == choose_device(device) == device
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="spelling") as error:
        choose_device(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_device_is_refused(device, monkeypatch):
    with pytest.raises(ValueError, match=f"{device.type}:7"):
        choose_device(f"{device.type}:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"cuda must be a device that torch sees.*pass cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_the_command_line_refuses_it_before_a_model_is_read(run, command):
    options = ["--prompt", "one"] if command == "generate" else []
    code, _, err = run(command, "no such model", *options, "--device", "gpu")
    assert code == 2
    assert "spelling" in err


def test_ids_of_a_function_or_an_offloaded_module_stay(device):
    ids = torch.arange(3, device=device)
    assert to_device_of(lambda ids: ids, ids) is ids
    assert to_device_of(torch.nn.Linear(1, 1, device="meta"), ids) is ids
    assert to_device_of(torch.nn.Linear(1, 1), ids).device.type == "cpu"


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags : avx2 avx512f avx512_bf16", True),
        ("flags : avx512f amx_bf16 amx_tile", True),
        ("Features : asimd bf16", True),
        ("flags : avx2 avx512f", False),
        (None, False),
    ],
)
def test_a_cpu_multiplies_bfloat16_fast_where_it_has_the_instructions(device, monkeypatch, flags, fast):
    def read_text(path):
        assert path == Path("/proc/cpuinfo")
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(Path, "read_text", read_text)
    assert fast_bfloat16() is fast_bfloat16(torch.device("cpu")) is fast
    if device.type != "cuda":
        assert fast_bfloat16(device)
