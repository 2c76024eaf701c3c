"""RCP training: bad arguments, settings and checkpoint files are refused."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from rcp_models import CONFIG, VOCABULARY, tiny_model, tiny_windows

from rcp_kernels.methods import rcp
from rcp_kernels.methods.rcp import training_state
from rcp_kernels.methods.rcp.block_reconstruction import BlockConfig


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    training_state.save_state(path, {"x": torch.ones(3)})
    code = f"""
        import resource, signal, torch
        from pathlib import Path
        from rcp_kernels.methods.rcp import training_state
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            training_state.save_state(Path({str(path)!r}), {{"x": torch.ones(100000)}})
        except OSError as error:
            print("refused", error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("refused"), result.stderr
    assert torch.equal(training_state.load_state(path)["x"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_a_damaged_or_later_checkpoint_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="must be a training state"):
        training_state.load_state(path)
    torch.save({"version": 99}, path)
    with pytest.raises(ValueError, match="must be 1, got 99"):
        training_state.load_state(path)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (torch.zeros(0, 16, dtype=torch.int64), "training must be"),
        (torch.zeros(16, dtype=torch.int64), "training must"),
    ],
)
def test_too_little_text_is_refused(training, message):
    with pytest.raises(ValueError, match=message):
        rcp.train(tiny_model(), training, tiny_windows(1), CONFIG)


def test_text_of_another_vocabulary_is_refused():
    outside = tiny_windows(1)
    outside[0, 3] = VOCABULARY
    for windows in ((outside, tiny_windows(1)), (tiny_windows(1), outside)):
        with pytest.raises(ValueError, match=r"train: \w+: token ids must be in \[0, 96\), .* got 96"):
            rcp.train(tiny_model(), *windows, CONFIG)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="batch must be a multiple of micro_batch times the processes, got 5 and 2 x 1"
    ):
        rcp.train(tiny_model(), tiny_windows(), tiny_windows(1), dataclasses.replace(CONFIG, batch=5))


@pytest.mark.parametrize("name", ["batch", "micro_batch", "workers", "validate_every", "checkpoint_every"])
def test_counts_of_zero_are_refused_before_anything_is_done(name):
    with pytest.raises(ValueError, match=f"RcpConfig: {name} must be an int of at least 1, got 0"):
        dataclasses.replace(CONFIG, **{name: 0})
    with pytest.raises(ValueError, match="BlockConfig: epochs must be an int of at least 1, got 0"):
        BlockConfig(epochs=0)


def test_config_round_trip_and_unknown_field():
    assert rcp.RcpConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match=r"got \['stepz'\]"):
        rcp.RcpConfig.from_dict({"stepz": 1})


def test_what_sharding_needs_is_named(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="shard needs an accelerator and a directory"):
        rcp.train(model, tiny_windows(), tiny_windows(3, 2), CONFIG, shard=True)
    with pytest.raises(ValueError, match=r"best\.pt must be there"):
        rcp.load_trained(model, CONFIG, tmp_path)
