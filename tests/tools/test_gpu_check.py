"""tools/gpu_check.sh with programs that only pretend: its steps, their order, failures, and time limits."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"

# Writes each call to $CALLS. $CARD is the answer of torch. A call that contains $FAILS fails, one that contains $HANGS
# does not end.
PYTHON = r"""#!/bin/bash
echo "RCP_CUDA=$RCP_CUDA ARCHS=$RCP_CUDA_ARCHS $(echo "$*" | tr '\n' ' ')" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo "$CARD" ;;
  *platform.python_version*) echo "Python 3" ;;
esac
if [ -n "$FAILS" ] && [[ "$*" == *"$FAILS"* ]]; then exit 3; fi
if [ -n "$HANGS" ] && [[ "$*" == *"$HANGS"* ]]; then sleep 60; fi
exit 0
"""
# One write for each call: three run at a time.
SANITIZER = '#!/bin/bash\necho "SANITIZER $(echo "$*" | tr "\\n" " ")" >>"$CALLS"\n'


@pytest.fixture
def gpu_check(tmp_path):
    """Runs the script: exit status, standard output, the calls of Python, and the summary."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("fake_python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(*arguments, card="90|NVIDIA H200", **variables):
        calls, out = tmp_path / "calls", tmp_path / "out"
        calls.write_text("")
        environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": "fake_python",
            "CALLS": str(calls),
            "OUT": str(out),
            "CARD": card,
            "FAILS": "",
            "HANGS": "",
        }
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], env=environment | variables, capture_output=True, text=True, timeout=120
        )
        summary = (out / "summary.md").read_text() if (out / "summary.md").exists() else ""
        return done.returncode, done.stdout, calls.read_text().splitlines(), summary

    return run


def test_every_step_on_a_card(gpu_check):
    code, out, calls, summary = gpu_check()
    assert code == 0, out
    assert summary.startswith("# NVIDIA H200, sm_90\n")
    for step in ("build", "emulated device", "triton", "check", "tests", "sanitizers"):
        assert f"| {step} | passed |" in summary
    assert "Every step that ran passed" in summary
    built = [call for call in calls if "-m pip install" in call]
    assert len(built) == 1
    assert built[0].startswith("RCP_CUDA=1 ARCHS=90 ")
    for option in ("--no-build-isolation", "--no-deps", "--no-index"):
        assert option in built[0]
    (checked,) = [call for call in calls if "rcp_kernels check" in call]
    assert "--device cuda --bench --seconds " in checked
    (tested,) = [call for call in calls if "-m pytest" in call]
    assert "tests/cuda/test_on_a_gpu.py" in tested
    assert "tests/check/test_check.py" in tested
    tools = [call.split()[2] for call in calls if call.startswith("SANITIZER")]
    assert sorted(tools) == ["initcheck", "memcheck", "racecheck"]


@pytest.mark.parametrize(("arguments", "card"), [((), ""), (("--rehearse",), "90|NVIDIA H200")])
def test_a_rehearsal_says_so_and_uses_no_gpu(gpu_check, arguments, card):
    code, out, calls, summary = gpu_check(*arguments, card=card)
    assert code == 0, out
    assert summary.startswith("**REHEARSAL: no GPU was used.")
    assert "REHEARSAL" in out
    assert "| sanitizers | skipped: no GPU |" in summary
    assert "| triton | skipped: no GPU |" in summary
    assert not any("RCP_CUDA=1" in call or "--device cuda" in call or "SANITIZER" in call for call in calls)
    assert any("--device cpu --bench" in call for call in calls)


@pytest.mark.parametrize(
    ("fails", "step"),
    [("rcp_kernels check", "check"), ("-m pytest", "tests"), ("emulated_device.py", "emulated device")],
)
def test_a_failed_step_does_not_stop_the_others(gpu_check, fails, step):
    code, _, _, summary = gpu_check(FAILS=fails)
    assert code == 1
    assert f"| {step} | FAILED: exit status 3 |" in summary
    assert "At least one step FAILED" in summary
    assert summary.count("| passed |") == 5


def test_without_rights_to_install_it_builds_in_place(gpu_check):
    code, _, calls, summary = gpu_check(FAILS="-m pip")
    assert code == 0
    assert any("setup.py build_ext --inplace" in call for call in calls)
    assert "| build | passed |" in summary


def test_a_step_that_hangs_is_stopped(gpu_check):
    code, _, calls, summary = gpu_check(HANGS="rcp_kernels check", SECONDS_IN_ALL="20")
    assert code == 1
    assert "| check | FAILED: stopped after 5 s |" in summary
    assert any("-m pytest" in call for call in calls)


def test_without_a_command_line_the_check_runs_untimed(gpu_check):
    code, _, calls, summary = gpu_check(FAILS="import typer, rich")
    assert code == 0
    assert "| check --bench | skipped: typer or rich is not installed |" in summary
    assert any("check_device('cuda')" in call for call in calls)


def test_wrong_usage(gpu_check):
    assert gpu_check("--nonsense")[0] == 2
