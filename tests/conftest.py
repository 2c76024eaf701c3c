"""Settings for every test. Imports no torch: tests/native runs under sanitizers, in a process without it."""

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# Whatever a library would like to fetch from a hub, no test may: it fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The first call into a kernel pays for thread pools and page faults, so a deadline would fail at random.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A submission is judged by the same examples each time; drawing new ones is for people at their desks.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def cpu_by_default(request, monkeypatch):
    """A test that does not ask for ``device`` computes on the CPU, on a machine with a GPU too."""
    hardware = sys.modules.get("rcp_kernels.hardware")  # tests/native runs without it
    if hardware is not None and "device" not in request.fixturenames:
        monkeypatch.setattr(hardware, "default_device", lambda: hardware.torch.device("cpu"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line: exit code, standard output, and standard error with the message of SystemExit."""
    from rcp_kernels.cli import app as cli

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rcp-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return command


def pytest_generate_tests(metafunc):
    """A test that asks for ``device`` runs on the emulated device, and on "cuda" where there is one."""
    if "device" in metafunc.fixturenames:
        import torch
        from emulated_device import load

        # Before the first backward of the process, at which torch counts the devices for good.
        load()
        names = ["emulated", "cuda"] if torch.cuda.is_available() else ["emulated"]
        metafunc.parametrize("device", names, indirect=True)


@pytest.fixture
def device(request):
    """A torch.device that is not the CPU. Operators refuse to mix its tensors with the CPU's."""
    import torch
    from emulated_device import load

    return torch.device("cuda", 0) if request.param == "cuda" else load()
