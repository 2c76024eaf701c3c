"""RCP training: both phases, resume, two processes, divergence."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from rcp_models import (
    CONFIG,
    assert_equal_states,
    rotated_tiny_model,
    student_values,
    tiny_model,
    tiny_windows,
)

from rcp_kernels.methods import rcp
from rcp_kernels.methods import student as student_module
from rcp_kernels.methods.rcp import training_state
from rcp_kernels.methods.rcp.block_reconstruction import BlockConfig, reconstruct_blocks
from rcp_kernels.methods.rcp.loop import Training
from rcp_kernels.methods.rcp.optimizer import schedule
from rcp_kernels.methods.student import make_student, students
from rcp_kernels.nn.model_digest import model_digest


@pytest.fixture
def one_thread():
    """With more threads, sums could differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_schedule_warms_up_and_falls_to_the_floor():
    shares = [schedule(step, 20, 4, 0.1) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(shares[4:]))
    assert schedule(20, 20, 4, 0.1) == pytest.approx(0.1)


def test_phase_one_lowers_the_loss_of_each_layer():
    model = tiny_model()
    teacher = copy.deepcopy(model)
    make_student(model, group_size=32, act_bits=16)
    losses = []
    reconstruct_blocks(
        model,
        teacher,
        tiny_windows(16),
        BlockConfig(sequences=16, epochs=6, batch=4, weight_lr=3e-3),
        after_layer=lambda _, layer: losses.append(layer),
    )
    assert len(losses) == 2
    for layer in losses:
        assert layer[-1] < layer[0]


def test_the_cache_changes_phase_one(monkeypatch):
    teacher, students_ = tiny_model(), []
    config = BlockConfig(sequences=4, epochs=1, batch=4)
    for kv_bits in (16, 4):
        student = tiny_model()
        make_student(student, group_size=32)
        reconstruct_blocks(student, teacher, tiny_windows(4), config, kv_bits=kv_bits)
        students_.append([layer.weight.detach().clone() for layer in students(student)])
    # The gradient passes the cache, so q, k and v of every layer change too.
    assert not any(torch.equal(a, b) for a, b in zip(*students_, strict=True))
    monkeypatch.setattr(student_module, "cache_argument", lambda *_: {})
    student = tiny_model()
    make_student(student, group_size=32)
    with pytest.raises(RuntimeError, match=r"layer model\.layers\.0: .* cache of 4 bits, got .* never asked it"):
        reconstruct_blocks(student, teacher, tiny_windows(4), config, kv_bits=4)


def test_phase_two_asks_the_cache(monkeypatch):
    monkeypatch.setattr(student_module, "cache_argument", lambda *_: {})
    with pytest.raises(RuntimeError, match=r"train: .* cache of 4 bits, got .* never asked it"):
        rcp.train(tiny_model(), tiny_windows(), tiny_windows(2), dataclasses.replace(CONFIG, blocks=None))


def test_training_brings_the_student_nearer_to_the_teacher():
    model = tiny_model()
    teacher = copy.deepcopy(model)
    make = dataclasses.replace(CONFIG, blocks=None, steps=40, weight_lr=2e-3, loss="forward_kl")
    ids = tiny_windows(32)

    def divergence(student):
        with torch.no_grad():
            s, t = student(ids).logits.log_softmax(-1), teacher(ids).logits.log_softmax(-1)
        return (t.exp() * (t - s)).sum(-1).mean().item()

    before = copy.deepcopy(model)
    make_student(before, group_size=32)
    result = rcp.train(model, ids, ids[:4], make)
    assert result.steps == 40
    assert result.tokens == 40 * 4 * 16
    assert divergence(model) < 0.8 * divergence(before)


def test_the_best_weights_are_kept(tmp_path):
    model = tiny_model()
    result = rcp.train(model, tiny_windows(), tiny_windows(3, 2), CONFIG, directory=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["validation"] for row in rows if row["kind"] == "validation"}
    assert sorted(measured) == [0, 3, 6]
    assert measured[result.best_step] == min(measured.values()) == result.best_perplexity
    best = training_state.load_state(tmp_path / "best.pt")["student"]
    for layer in students(model):
        assert torch.equal(layer.weight, best[f"{layer.name}.weight"])
    training_state.write_curve(tmp_path / "log.jsonl", tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text().splitlines()[0] == "step,tokens,validation,seconds,cpu_seconds"


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [("layers", 1), ("steps", 3), ("steps", 5)])
def test_resume_ends_with_the_same_bits(tmp_path, one_thread, stop):
    arguments = (tiny_windows(), tiny_windows(3, 2))
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    whole = tiny_model()
    result = rcp.train(whole, *arguments, config)

    def interrupt(phase, done, *_):
        if (phase, done) == stop:
            raise Stopped

    with pytest.raises(Stopped):
        rcp.train(tiny_model(), *arguments, config, directory=tmp_path, progress=interrupt)
    resumed = tiny_model()
    again = rcp.train(resumed, *arguments, config, directory=tmp_path)
    assert_equal_states(student_values(whole), student_values(resumed))
    assert (again.best_step, again.best_perplexity) == (result.best_step, result.best_perplexity)
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_model(seed=5),
        lambda: rotated_tiny_model("walsh"),
        lambda: rotated_tiny_model("gsr", r3=False),
    ],
    ids=["model", "rotation", "r3"],
)
def test_a_checkpoint_of_another_model_or_rotation_is_refused(tmp_path, other):
    config = dataclasses.replace(CONFIG, blocks=None, init="uniform", steps=1, validate_every=1, checkpoint_every=1)
    arguments = tiny_windows(), tiny_windows(2, seed=2)
    first = rotated_tiny_model("gsr")
    rcp.train(first, *arguments, config, directory=tmp_path)
    with pytest.raises(ValueError, match="same settings, model, rotation and text, got one of another"):
        rcp.train(other(), *arguments, config, directory=tmp_path)
    with pytest.raises(ValueError, match="began with this model, rotated alike, got one of another"):
        rcp.load_trained(other(), config, tmp_path)
    again = rotated_tiny_model("gsr")
    rcp.load_trained(again, config, tmp_path)
    assert_equal_states(student_values(first), student_values(again))


def test_the_digest_sees_a_sign_a_row_a_place_and_the_config():
    digests = {model_digest(rotated_tiny_model("hadamard", seed=seed, r2=False)) for seed in (0, 1)}
    model = tiny_model()
    digests.add(model_digest(model))
    assert model_digest(copy.deepcopy(model)) in digests
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.copy_(weight.flip(0))
    digests.add(model_digest(model))
    model.config.rms_norm_eps *= 2
    digests.add(model_digest(model))
    assert len(digests) == 5
    model.config.name_or_path = "elsewhere"
    assert model_digest(model) in digests


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    rcp.train(tiny_model(), tiny_windows(), tiny_windows(3, 2), CONFIG, directory=tmp_path)
    with pytest.raises(ValueError, match="same settings, model, rotation and text, got one of another"):
        rcp.train(
            tiny_model(), tiny_windows(), tiny_windows(3, 2), dataclasses.replace(CONFIG, seed=1), directory=tmp_path
        )


_KILLED = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from test_rcp import *
    config = dataclasses.replace(CONFIG, checkpoint_every=1, steps=2000, validate_every=1000)
    rcp.train(tiny_model(), tiny_windows(), tiny_windows(3, 2), config, directory=Path({folder!r}))
"""


@pytest.mark.slow
def test_kill_9_leaves_a_checkpoint_that_resumes_with_the_same_bits(tmp_path, one_thread):
    code = textwrap.dedent(_KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    state = tmp_path / "state.pt"
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        if state.exists() and training_state.load_state(state)["step"] >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    stored = training_state.load_state(state)
    assert stored["step"] >= 3

    def stop_at(step):
        def interrupt(phase, done, *_):
            if phase == "steps" and done == step:
                raise Stopped

        return interrupt

    config = dataclasses.replace(CONFIG, checkpoint_every=1, steps=2000, validate_every=1000)
    target = stored["step"] + 2
    models = tiny_model(), tiny_model()
    for model, folder in zip(models, (tmp_path, None), strict=True):
        with pytest.raises(Stopped):
            rcp.train(model, tiny_windows(), tiny_windows(3, 2), config, directory=folder, progress=stop_at(target))
    assert_equal_states(*(student_values(model) for model in models))


@pytest.mark.parametrize("act_bits", [4, 16])
def test_nan_stops_names_the_layer_and_keeps_the_checkpoint(tmp_path, act_bits):
    model = tiny_model()
    config = dataclasses.replace(CONFIG, act_bits=act_bits, checkpoint_every=1)
    saved = []

    def poison(phase, done, *_):
        if (phase, done) == ("steps", 3):
            with torch.no_grad():
                model.get_submodule("model.layers.1.mlp.gate_proj").weight[0, 0] = math.nan
        if (phase, done) == ("steps", 2):
            saved.append(None)

    with pytest.raises(rcp.Diverged, match=r"layer model\.layers\.1\.mlp\.(gate|down)_proj.*last good checkpoint is"):
        rcp.train(model, tiny_windows(), tiny_windows(3, 2), config, directory=tmp_path, progress=poison)
    stored = training_state.load_state(tmp_path / "state.pt")
    assert saved
    assert stored["step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in stored["student"].values())


@pytest.mark.parametrize("given", [True, False])
def test_the_teacher_keeps_its_tables_in_float32(given):
    """With RoPE's tables in bfloat16, the angle of the last of 64 positions would be off by a tenth of a radian."""
    model = tiny_model()
    teacher = copy.deepcopy(model) if given else None
    run = Training(
        model, tiny_windows(), tiny_windows(3, 2), dataclasses.replace(CONFIG, bf16=True), teacher,
        {}, None, None, False, None,
    )  # fmt: skip
    assert {p.dtype for p in run.models.teacher_model.parameters()} == {torch.bfloat16}
    tables = dict(run.models.teacher_model.named_buffers())
    assert tables
    for name, table in tiny_model().named_buffers():
        assert table.dtype == torch.float32
        assert torch.equal(tables[name], table), name


_PATH = os.pathsep.join([str(Path(rcp.__file__).parents[3]), os.environ.get("PYTHONPATH", "")])


_TWO = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from test_rcp import *
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    folder = Path({folder!r})
    for shard in (False, True):
        (folder / str(shard)).mkdir(exist_ok=True)
        rcp.train(
            tiny_model(),
            tiny_windows(),
            tiny_windows(3, 2),
            CONFIG,
            directory=folder / str(shard),
            accelerator=accelerator,
            shard=shard,
        )
    torch.distributed.barrier()  # a process that leaves first may be aborted
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(_TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": _PATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one = tiny_model()
    rcp.train(one, tiny_windows(), tiny_windows(3, 2), CONFIG)
    for shard in (False, True):
        two = tiny_model()
        rcp.load_trained(two, CONFIG, tmp_path / str(shard))
        stored = training_state.load_state(tmp_path / str(shard) / "state.pt")
        assert stored["step"] == 6
        assert len(stored["optimizer"]["state"]) == 14 * 5
        # Sums have another order, and the first steps of AdamW follow the sign of even the smallest gradient.
        for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            difference = (other - value).abs()
            assert float(difference.mean()) < 1e-5, (shard, name)
            assert float(difference.max()) < 5e-3, (shard, name)
