"""RCP on another device, with recomputed activations, and with 8-bit states."""

import dataclasses
import json

import pytest
import torch
from rcp_models import CONFIG, assert_equal_states, student_values, tiny_model, tiny_windows

from rcp_kernels.methods import rcp
from rcp_kernels.methods.rcp.training_state import load_state
from rcp_kernels.methods.student import students


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(model=None, **options):
    fields = {name: options.pop(name) for name in list(options) if name in CONFIG.to_dict()}
    model = tiny_model() if model is None else model
    config = dataclasses.replace(CONFIG, workers=1, **fields)
    rcp.train(model, tiny_windows(), tiny_windows(3, 2), config, **options)
    return student_values(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_activation_checkpointing_changes_no_bit(bf16):
    model = tiny_model()
    assert_equal_states(trained(bf16=bf16), trained(model, bf16=bf16, activation_checkpointing=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_goes_on_with_activation_checkpointing(tmp_path):
    class Stopped(Exception):
        pass

    def stop(phase, done, *_):
        if (phase, done) == ("steps", 3):
            raise Stopped

    expected = trained()
    with pytest.raises(Stopped):
        trained(directory=tmp_path, progress=stop)
    assert_equal_states(expected, trained(directory=tmp_path, activation_checkpointing=True))


def test_training_on_a_device_gives_the_cpu_s_student(device, tmp_path):
    model = tiny_model()
    there = trained(model, device=device, directory=tmp_path)
    assert {value.device.type for value in there.values()} == {"cpu"}
    log = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log.count("layer") == 2
    for name, value in trained().items():
        # Attention is another kernel there, and AdamW's first steps follow the sign of the smallest gradient.
        difference = (there[name] - value).abs()
        assert float(difference.mean()) < 1e-4, name


def test_phase_one_holds_one_layer_on_the_device(device):
    if device.type != "emulated":
        pytest.skip("counts bytes of tiny tensors")
    memory = torch.get_device_module(device)
    peaks = []
    for steps in (0, 1):
        before = memory.memory_allocated()
        memory.reset_peak_memory_stats()
        held = []
        trained(
            device=device,
            steps=steps,
            progress=lambda phase, *_, held=held: held.append(memory.memory_allocated()) if phase == "layers" else None,
        )
        assert max(held) - before < 64 * 64 * 4  # between layers there is no weight, only RoPE's tables
        peaks.append(memory.max_memory_allocated() - before)
    assert memory.memory_allocated() == before
    assert peaks[0] < peaks[1]


@pytest.mark.slow  # torchao compiles its step
def test_8_bit_states_train_and_resume(tmp_path):
    pytest.importorskip("torchao")
    options = {"blocks": None, "optimizer": "adamw8bit", "checkpoint_every": 3, "steps": 3}
    first = trained(directory=tmp_path, **options)
    exact = trained(blocks=None, checkpoint_every=3, steps=3)
    # The first step starts from zeros, so quantized states change later steps only.
    for name, value in exact.items():
        assert float((first[name] - value).abs().mean()) < 1e-3, name
    states = load_state(tmp_path / "state.pt")["optimizer"]["state"].values()
    assert {type(state["exp_avg"]).__name__ for state in states} >= {"OptimState8bit"}
    assert_equal_states(first, trained(directory=tmp_path, **options))


def test_an_unknown_optimizer_and_a_shard_of_8_bit_states_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer must be one of .* 'sgd'"):
        dataclasses.replace(CONFIG, optimizer="sgd")
    with pytest.raises(ValueError, match="optimizer must be 'adamw' with shard, got 'adamw8bit'"):
        rcp.train(
            tiny_model(),
            tiny_windows(),
            tiny_windows(),
            dataclasses.replace(CONFIG, optimizer="adamw8bit"),
            directory=tmp_path,
            accelerator=type("One", (), {"num_processes": 1, "process_index": 0}),
            shard=True,
        )
    assert not students(tiny_model())
