"""``rcp-kernels check``: it passes here, and it cannot pass with a wrong kernel."""

import json
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import StaticLayer

from rcp_kernels import ops
from rcp_kernels.check import check_device, model, run
from rcp_kernels.check.cases import Case, exactly, run_case, within
from rcp_kernels.check.report import UNKNOWN, Report, card_facts
from rcp_kernels.evaluation.decoding import Decoder, _can_capture
from rcp_kernels.evaluation.static_cache import static_cache
from rcp_kernels.models.hf import cache_argument

CPU = torch.device("cpu")


def some_cases(*names):
    """Cases of these operators, or every 40th of all: a second instead of ten."""
    found = run.all_cases()
    return [case for case in found if case.op in names] if names else found[::40]


@pytest.fixture
def few_cases(monkeypatch):
    """The command runs every 40th case, and two of the linear layer whose shapes the tests name."""
    named = [case for case in some_cases("lut_linear") if case.kind == "W2A4" and "48 x 513" in case.name][:2]
    cases = [*some_cases(), *named]
    monkeypatch.setattr(run, "all_cases", lambda: cases)
    return named


@pytest.mark.slow
def test_every_case_passes_on_another_device(device):
    report = check_device(device)
    assert report.failed == []
    assert len(report.outcomes) > 500
    # What depends on CUDA is skipped openly, and nothing else is.
    if device.type != "cuda":
        assert {outcome.note for outcome in report.skipped} == {"not CUDA"}


def test_a_few_cases_on_another_device(device):
    report = check_device(device, cases=some_cases())
    assert report.failed == []


def test_the_cases_cover_every_format_and_number_of_tokens():
    cases = run.all_cases()
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    linear = [case for case in cases if case.op == "lut_linear"]
    assert {f"W{bits}A{act_bits}" for bits in (2, 3, 4) for act_bits in (4, 8, 16)} <= {case.kind for case in linear}
    for words in ("1 tokens", "512 tokens", " 0 tokens", "float16", "bfloat16", "float32", "misaligned", "strided"):
        assert any(words in case.name for case in linear), words


def test_the_command_writes_what_it_prints(run, few_cases, tmp_path):
    code, out, err = run("check", "--device", "cpu", "--out", tmp_path / "results")
    assert code == 0, err
    assert "passed on cpu" in out
    written = json.loads((tmp_path / "results" / "check.json").read_text())
    assert written["verdict"] in out
    assert {case["status"] for case in written["cases"]} <= {"pass", "skipped"}
    assert written["card"]["device"] == "cpu"
    assert "| lut_linear | W2A4 |" in (tmp_path / "results" / "check.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_wrong_usage(run):
    code, _, err = run("check", "--device", "cuda")
    assert code == 2
    assert "cuda" in err


def test_an_unknown_device_is_wrong_usage(run):
    code, _, err = run("check", "--device", "cudda")
    assert code == 2
    assert "cudda" in err


# A wrong kernel.


def assert_names_the_failure(result, named, word):
    code, out, _ = result
    assert code == 1
    for case in named:
        assert f"FAILED lut_linear, {case.name}" in out
    assert word in out
    assert "FAIL" in out


def test_a_wrong_value_fails_and_is_named(run, few_cases, monkeypatch, tmp_path):
    true = ops.lut_linear

    def wrong(x, weight, bias, geometry, *rest, **options):
        y = true(x, weight, bias, geometry, *rest, **options)
        if geometry[:2] == (48, 513):
            y[-1, -1] *= 1.01  # one value of the result
        return y

    monkeypatch.setattr(ops, "lut_linear", wrong)
    assert_names_the_failure(run("check", "--device", "cpu", "--out", tmp_path), few_cases, "of the bound")
    written = json.loads((tmp_path / "check.json").read_text())
    assert {case["case"] for case in written["cases"] if case["status"] == "fail"} >= {c.name for c in few_cases}
    assert few_cases[0].name in (tmp_path / "check.md").read_text()


def test_nan_fails(run, few_cases, monkeypatch):
    true = ops.lut_linear
    monkeypatch.setattr(ops, "lut_linear", lambda *a, **o: true(*a, **o) * float("nan"))
    assert_names_the_failure(run("check", "--device", "cpu"), few_cases, "nan")


def test_an_exception_fails(run, few_cases, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(ops, "lut_linear", broken)
    assert_names_the_failure(run("check", "--device", "cpu"), few_cases, "RuntimeError: an illegal memory access")


def test_two_runs_that_differ_fail(run, few_cases, monkeypatch):
    """The second result is within the bound, but has other bits."""
    true, calls = ops.lut_linear, []

    def wavering(x, *arguments, **options):
        y = true(x, *arguments, **options)
        calls.append(y)
        return y if len(calls) % 2 else torch.nextafter(y, torch.full_like(y, 1e4))

    monkeypatch.setattr(ops, "lut_linear", wavering)
    assert_names_the_failure(run("check", "--device", "cpu"), [], "a second run")


PLANTED = {
    "quantize_activation": lambda result: (result[0] + 1, result[1]),
    "walsh_transform": lambda y: y * (1 + 2**-6),
    "walsh_quantize": lambda result: (result[0], result[1] * 2),
    "kv_cache_attention": lambda y: y + 0.1,
    "kmeans_levels": lambda y: y + 1e-3,
    "clip_search": lambda y: y * 0.9,
    "nearest_codes": lambda codes: codes ^ 1,
    "gptq_round": lambda result: (result[0] ^ 1, result[1]),
    "decode_attention": lambda y: y + 0.1,
    "lut_linear_fused": lambda y: y + 1,
    "dequantize": lambda y: y + 1,
}


@pytest.mark.parametrize("op", PLANTED)
def test_a_fault_in_any_operator_fails(op, monkeypatch):
    true = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *a, **o: PLANTED[op](true(*a, **o)))
    checked = {"dequantize": "pack_weight"}.get(op, op)
    # A result without entries has no fault.
    cases = [case for case in some_cases(checked) if not case.name.startswith(("0 x", "4 x 0"))]
    passed = [case.name for case in cases if run_case(case, CPU).status == "pass"]
    assert cases
    assert passed == []


def test_a_cache_that_is_written_wrongly_fails(monkeypatch):
    true = ops.kv_cache_append
    monkeypatch.setattr(ops, "kv_cache_append", lambda x, *rest: true(x * 1.5, *rest))
    assert {run_case(case, CPU).status for case in some_cases("kv_cache_append")} == {"fail"}


def test_other_tokens_on_the_device_fail(monkeypatch):
    """A model that is loaded wrongly on the device decodes other tokens."""
    true = model.load_quantized

    def damaged(folder, device):
        loaded, config = true(folder, device)
        if device != "cpu":
            with torch.no_grad():
                loaded.get_submodule("model.norm").weight[:64] = 0
        return loaded, config

    monkeypatch.setattr(model, "load_quantized", damaged)
    outcomes = [run_case(case, CPU) for case in some_cases("save, load, decode")]
    assert {outcome.status for outcome in outcomes} == {"fail"}
    assert all("tokens" in outcome.note for outcome in outcomes)


# Comparisons.


def test_what_is_within_a_bound():
    exact = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert within("y", exact + 1e-3, exact, 1e-2).wrong == 0
    far = within("y", exact + 1e-3, exact, torch.tensor([1e-2, 1e-4, 1e-2]))
    assert (far.wrong, far.count) == (1, 3)
    assert far.ratio == pytest.approx(10, rel=1e-6)
    assert within("y", torch.tensor([float("nan")]), torch.tensor([0.0]), 1e9).wrong == 1
    assert within("y", torch.tensor([float("inf")]), torch.tensor([0.0]), 1e9).wrong == 1
    assert exactly("q", torch.tensor([1, 2]), torch.tensor([1, 3])).wrong == 1
    assert exactly("q", torch.zeros(0, 3), torch.zeros(0, 3)).count == 0
    with pytest.raises(ValueError, match="shape"):
        within("y", torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="dtype"):
        exactly("q", torch.zeros(2), torch.zeros(2, dtype=torch.float16))


def test_a_case_without_any_comparison_is_no_pass():
    assert run_case(Case("op", "kind", "case", "", lambda device: iter(())), CPU).status == "fail"


def test_json_has_no_nan():
    case = Case(
        "op", "", "x", "", lambda device: iter([within("y", torch.tensor([float("nan")]), torch.zeros(1), 1.0)])
    )
    report = Report(CPU, [run_case(case, CPU)])
    assert report.failed
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_facts_of_a_card_that_cannot_be_read(device):
    facts = card_facts(device)
    if device.type != "cuda":
        assert facts == {"device": str(device), "card": UNKNOWN}


class Properties:
    """The fields of torch.cuda.get_device_properties that the benchmarks read."""

    name, major, minor, multi_processor_count, L2_cache_size, total_memory = "A card", 9, 0, 132, 60 << 20, 141 * 10**9
    uuid = "12-34"


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *--id=GPU-12-34*) [ -n "$HIDES_THE_ID" ] && exit 6 ;;
esac
case "$*" in
  *--query-gpu=driver_version,clocks.sm,*noheader*) echo "580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W, 41" ;;
  *) exit 2 ;;
esac
"""


@pytest.mark.parametrize("hides_the_id", ["", "1"])
def test_driver_and_clocks_come_from_nvidia_smi(monkeypatch, tmp_path, hides_the_id):
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("HIDES_THE_ID", hides_the_id)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    facts = card_facts(torch.device("cuda"))
    assert (facts["card"], facts["compute_capability"], facts["l2_mb"]) == ("A card", "9.0", "60")
    assert (facts["driver"], facts["sm_clock"], facts["temperature"]) == ("580.1", "1980 MHz", "41")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert card_facts(torch.device("cuda"))["driver"] == UNKNOWN


# A step that a CUDA graph can hold.


class NoSynchronization(TorchDispatchMode):
    """Raises where a CUDA graph could not be captured: a value read by the host, or a copy between devices."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), f"{name} waits for the device"
        before = {value.device for value in arguments if isinstance(value, torch.Tensor) and value.dim()}
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and name in ("_to_copy", "copy_", "clone"):
            assert before <= {result.device}, f"{name} from {before} to {result.device}"
        return result


@pytest.mark.parametrize("packed", [False, True])
def test_a_decode_step_reads_nothing_back(device, packed):
    llama = model.small_llama().to(device)
    # With a forward of its own the Decoder does not capture the step, whose operators are then seen.
    decoder = Decoder(llama, torch.arange(5)[None], cache=static_cache(llama, 16, packed), forward=llama)
    decoder.step()
    with NoSynchronization():
        decoder.step()
    assert not decoder.captured


@pytest.mark.parametrize("packed", [False, True])
def test_a_decoder_can_capture_the_cache(packed, monkeypatch):
    """On every supported release of transformers: what a capture's warm-up decodes is taken back."""
    # As before 5.24.
    monkeypatch.setattr(StaticLayer, "is_croppable", False, raising=False)
    llama, ids = model.small_llama(), torch.arange(6)[None]
    cache = static_cache(llama, 16, packed)
    assert _can_capture(llama, cache)
    with torch.inference_mode():
        expected = llama(ids, **cache_argument(llama, cache)).logits[:, -1]
        cache.crop(-1)
        found = llama(ids[:, -1:], position_ids=torch.tensor([[5]]), **cache_argument(llama, cache)).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_step_without_a_graph_is_no_captured_step(monkeypatch):
    """The case must not pass where a Decoder silently runs its steps one by one."""
    case = next(case for case in run.all_cases() if case.op == "captured decode")
    assert run_case(case, CPU).note == "not CUDA"

    class CallsItselfCuda:
        type = "cuda"

    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    outcome = run_case(case, CallsItselfCuda())
    assert outcome.status == "fail"
    assert "was not captured" in outcome.note
