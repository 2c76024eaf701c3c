"""RCP training: losses against formulas, gradients, resume, two processes, divergence, and the text to learn on."""

import copy
import dataclasses
import itertools
import json
import math
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers

from rcp_kernels import QuantLinear, ops
from rcp_kernels.data import corpus
from rcp_kernels.evaluation.perplexity import perplexity_of
from rcp_kernels.methods import rcp
from rcp_kernels.methods import student as student_module
from rcp_kernels.methods.rcp import training_state
from rcp_kernels.methods.rcp.block_reconstruction import BlockConfig, reconstruct_blocks
from rcp_kernels.methods.rcp.distillation import (
    LOSSES,
    Head,
    distillation_loss,
    mean_confidence,
    reverse_weight,
    student_perplexity,
)
from rcp_kernels.methods.rcp.optimizer import schedule
from rcp_kernels.methods.rcp.training import Training
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.methods.student import (
    FakeQuantKV,
    FakeQuantLinear,
    export_student,
    fake_quantize_activation,
    make_student,
    students,
    with_quantized_weights,
)
from rcp_kernels.models.hf import cache_argument
from rcp_kernels.nn.model_digest import model_digest

VOCABULARY = 96
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
CONFIG = rcp.RcpConfig(
    group_size=32,
    blocks=BlockConfig(sequences=4, epochs=1, batch=2),
    steps=6,
    batch=4,
    micro_batch=2,
    warmup=2,
    validate_every=3,
    checkpoint_every=2,
    bf16=False,
)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    with torch.no_grad():  # large enough that activations and attention are not near linear
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def rotated_tiny_model(rotation, **options):
    model = tiny_model()
    rotate_model(model, rotation, group_size=32, **options)
    return model


def tiny_windows(count=12, seed=1, length=16):
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def one_thread():
    """A sum split over threads could differ in the last bit with their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def student_values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- losses


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradient_are_the_formulas(loss, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(300, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    m = reverse_weight(loss, 0.3)
    assert m == {"cakld": 0.3, "forward_kl": 0.0, "reverse_kl": 1.0, "symmetric_kl": 0.5}[loss]
    exact = hidden.clone().requires_grad_()

    def distribution(h):
        logits = h @ weight.T
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).softmax(-1)

    s, t = distribution(exact), distribution(teacher)
    expected = (m * (s * (s / t).log()).sum(-1) + (1 - m) * (t * (t / s).log()).sum(-1)).mean()
    expected.backward()

    head = Head(weight.float(), softcap)
    got = hidden.float().requires_grad_()
    value = distillation_loss(got, teacher.float(), head, head, m)
    (3 * value).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(got.grad.double(), 3 * exact.grad, rtol=1e-3, atol=1e-6)


def test_loss_of_equal_distributions_is_zero():
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    head = Head(torch.randn(7, 8, generator=torch.Generator().manual_seed(1)))
    assert distillation_loss(hidden, hidden, head, head, 0.4).item() == pytest.approx(0.0, abs=1e-6)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"loss must be one of .* got 'kl'; check the spelling"):
        reverse_weight("kl", 0.5)


def test_confidence_is_the_mean_largest_probability():
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(7, 8, generator=generator))
    hidden = torch.randn(600, 8, generator=generator)
    value = mean_confidence(
        lambda ids: hidden[ids.flatten()], head, [torch.arange(400)[None], torch.arange(400, 600)[None]]
    )
    assert value == pytest.approx((hidden @ head.weight.T).softmax(-1).amax(-1).mean().item(), rel=1e-5)


# --- the student


@given(st.sampled_from([4, 8]), st.sampled_from([1.0, 0.9]), st.integers(0, 2**31))
def test_fake_quantized_activation_is_the_operator_and_passes_the_gradient(bits, clip, seed):
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    q, scale = ops.quantize_activation(x.detach(), bits, clip)
    y = fake_quantize_activation(x, bits, clip)
    assert torch.equal(y, q.float() * scale[:, None])
    grad = torch.randn(3, 33, generator=torch.Generator().manual_seed(seed + 1))
    y.backward(grad)
    inside = x.detach().abs() <= clip * x.detach().abs().amax(-1, keepdim=True)
    assert torch.equal(x.grad, grad if clip == 1.0 else grad * inside)


def test_gradients_reach_every_weight_and_every_quantizer():
    model = tiny_model()
    rotate_model(model, "gsr", group_size=32)
    make_student(model, group_size=32)
    output = model(tiny_windows(2), use_cache=False, **cache_argument(model, FakeQuantKV(4))).logits
    output.square().mean().backward()
    layers = students(model)
    assert len(layers) == 14
    for layer in layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (layer.name, name)
            assert float(parameter.grad.abs().max()) > 0, (layer.name, name)
    trained = {id(p) for layer in layers for p in layer.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_held_weights_give_the_same_gradients():
    one, other = tiny_model(), tiny_model()
    for model in (one, other):
        make_student(model, group_size=32)
    parts = tiny_windows(4).split(2)
    for ids in parts:
        one(ids).logits.square().mean().backward()
    with with_quantized_weights(other, torch.float32):
        for ids in parts:
            other(ids).logits.square().mean().backward()
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_exported_layer_has_the_trained_weight_and_nearly_the_same_output():
    model = tiny_model()
    rotate_model(model, "gsr", group_size=32)
    make_student(model, group_size=32)
    layers = {layer.name: layer for layer in students(model)}
    weights = {name: layer.quantizer(layer.weight).detach() for name, layer in layers.items()}
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    down = next(name for name in layers if name.endswith("down_proj"))
    expected = layers[down](x).detach()
    export_student(model)
    assert not students(model)
    for name, weight in weights.items():
        packed = model.get_submodule(name)
        assert isinstance(packed, QuantLinear)
        assert torch.equal(packed.dequantize(), weight), name
    # Float sums against exact integers: 128 products.
    torch.testing.assert_close(model.get_submodule(down)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_packed_already_is_named():
    model = tiny_model()
    make_student(model, group_size=32)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj must be an nn\.Linear"):
        make_student(model, group_size=32)


# --- training


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
    # q, k and v of every layer learn from what comes after the cache too.
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


@pytest.mark.parametrize("given", [True, False])
def test_the_teacher_keeps_its_tables_in_float32(given):
    """Of RoPE: in bfloat16 the last of 64 positions would be off by a tenth of a radian."""
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


@pytest.mark.parametrize("name", ["batch", "micro_batch", "workers", "validate_every", "checkpoint_every"])
def test_counts_of_zero_are_refused_before_anything_is_done(name):
    with pytest.raises(ValueError, match=f"RcpConfig: {name} must be an int of at least 1, got 0"):
        dataclasses.replace(CONFIG, **{name: 0})
    with pytest.raises(ValueError, match="BlockConfig: epochs must be an int of at least 1, got 0"):
        BlockConfig(epochs=0)


def test_a_loss_beyond_the_exponential_is_an_infinite_perplexity():
    assert perplexity_of(2.0) == math.exp(2.0)
    assert perplexity_of(1000.0) == math.inf
    head = Head(torch.tensor([[2000.0], [0.0]]))
    assert student_perplexity(lambda ids: torch.ones(ids.numel(), 1), head, torch.ones(1, 4, dtype=torch.int64)) == (
        math.inf
    )


def test_config_round_trip_and_unknown_field():
    assert rcp.RcpConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match=r"got \['stepz'\]"):
        rcp.RcpConfig.from_dict({"stepz": 1})


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
    torch.distributed.destroy_process_group()
"""


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
        # Sums in another order, then six steps of AdamW, whose first ones follow the sign of a gradient of any size.
        for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            difference = (other - value).abs()
            assert float(difference.mean()) < 1e-5, (shard, name)
            assert float(difference.max()) < 5e-3, (shard, name)


def test_what_sharding_needs_is_named(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="shard needs an accelerator and a directory"):
        rcp.train(model, tiny_windows(), tiny_windows(3, 2), CONFIG, shard=True)
    with pytest.raises(ValueError, match=r"best\.pt must be there"):
        rcp.load_trained(model, CONFIG, tmp_path)


# --- text


def test_the_corpus_shares_no_thirteen_words_with_the_held_out_text():
    held_out = "\n".join(pydoc_data.topics.topics.values())
    text = corpus.docstring_corpus(("stdlib",))
    comments = corpus.comment_corpus(("stdlib",))
    assert len(text.text) > 500_000
    assert len(comments.text) > 100_000
    assert text.dropped > 0
    assert not corpus._ngrams(text.text + comments.text) & corpus._ngrams(held_out)


def test_the_corpus_is_the_same_again():
    one, again = (corpus.docstring_corpus(("json", "email")) for _ in range(2))
    assert one == again
    assert len(one.documents) > 10


COMMENTS = """\
# Copyright of somebody. {words}

{words}  # {words}
# x = f(a[1], b[2]) + g(c[3], d[4]); y = {{e: 5, f: 6}}; z = h(x, y) * 7 ** 8; print(x, y, z, 9, 10, 11, 12, 13, 14)
# for i in range(10): a[i] = b[i] + c[i]; d[i] = e[i] - f[i]; if a[i] > d[i]: g(a[i], d[i], i); else: h(b[i], c[i], i)

    # {words}
    #
    # Another paragraph.
def f(): ...
"""


def test_comments_are_taken_where_they_are_prose(tmp_path, monkeypatch):
    words = "These are words of a comment, and enough of them that it says something. " * 3
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(COMMENTS.format(words=words))
    (tmp_path / "package" / "latin.py").write_bytes(b"# \xe9" + words.encode())
    monkeypatch.syspath_prepend(tmp_path)
    assert corpus.comment_corpus(("package",)).documents == (f"{words.strip()}\n\nAnother paragraph.",)
    assert corpus.comment_corpus(("package",), exclude=words).documents == ()


def test_ngrams_are_runs_of_thirteen_words():
    words = [f"w{i}" for i in range(20)]
    runs = corpus._ngrams(" ".join(words))
    assert len(runs) == 8
    assert len(runs & corpus._ngrams(" ".join(words[:13]))) == 1
    assert not corpus._ngrams(" ".join(words[:12]))


def test_an_unknown_package_is_refused():
    with pytest.raises(ValueError, match="must be an installed package"):
        corpus.docstring_corpus(("no_such_package_here",))


@given(st.integers(1, 400), st.integers(1, 20))
def test_windows_are_the_stream_cut_and_shuffled(tokens, length):
    ids = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(ValueError, match=f"window of {length} tokens"):
            corpus.split_windows(ids, length)
        return
    windows = corpus.split_windows(ids, length)
    assert windows.shape == (tokens // length, length)
    assert torch.equal(windows[windows[:, 0].argsort()].flatten(), torch.arange(tokens // length * length))


def test_text_files_must_be_utf8_and_not_empty(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        corpus.file_text(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="must hold text"):
        corpus.file_text(path)


def test_fake_quant_linear_keeps_a_bias():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 8)
    from rcp_kernels.methods.ldp import LearnableDirectPartitioning

    layer = FakeQuantLinear(linear, LearnableDirectPartitioning((8, 32), 2, 32), 16, 1.0, "x")
    x = torch.randn(3, 32)
    expected = x @ layer.quantizer(layer.weight).T + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
