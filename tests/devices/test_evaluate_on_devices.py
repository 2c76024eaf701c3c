"""eval and generate on a device that is not the CPU: the CPU's results, and no tensor left behind."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from language_of_numbers import WORDS, write_model, write_text  # noqa: E402

from rcp_kernels.evaluation.decoding import decode_seconds, greedy_tokens  # noqa: E402
from rcp_kernels.evaluation.divergence import divergence, prompt_windows  # noqa: E402
from rcp_kernels.evaluation.perplexity import perplexity  # noqa: E402
from rcp_kernels.models.load import load_float  # noqa: E402
from rcp_kernels.pipeline import Recipe, evaluate, generate, quantize  # noqa: E402
from rcp_kernels.pipeline.load import load_any  # noqa: E402

IDS = torch.arange(96) * 7 % len(WORDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, and a quantized one with 4-bit activations and a 4-bit cache."""
    folder = tmp_path_factory.mktemp("models")
    model = write_model(folder / "float")
    load_float(str(model), dtype=torch.bfloat16)[0].save_pretrained(model)
    recipe = Recipe(str(model), "rtn", rotation="hadamard", w_bits=4, a_bits=4, kv_bits=4, group_size=32)
    quantize(recipe, folder / "quantized", device="cpu")
    return {"float": model, "quantized": folder / "quantized"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "numbers.txt")


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_eval_and_its_divergence_are_those_of_the_cpu(run, device, folders, text, tmp_path, kind):
    found = {}
    for name in ("cpu", str(device)):
        options = ["--tokens", 64, "--window", 16, "--divergence-from", folders["float"], "--new-tokens", 6]
        path = tmp_path / f"{torch.device(name).type}.json"
        code, said, err = run(
            "eval", folders[kind], "--text", text, *options, "--device", name, "--dtype", "float32", "--json", path
        )
        assert code == 0, err
        assert f"float32 on {name}" in said
        found[name] = json.loads(path.read_text())
    here, there = found["cpu"], found[str(device)]
    assert there["device"] == str(device)
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-4)
    assert there["divergence"] == here["divergence"]


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("options", [[], ["--seed", 3, "--temperature", 0.8, "--top-p", 0.9]])
def test_generate_continues_a_prompt(run, device, folders, kind, options):
    prompt = ["--prompt", "one two three", "--new-tokens", 8, "--dtype", "float32", *options]
    code, said, err = run("generate", folders[kind], *prompt, "--device", device)
    assert code == 0, err
    assert set(said.split()) <= set(WORDS)
    assert run("generate", folders[kind], *prompt, "--device", device)[1] == said
    if not options or device.type != "cuda":  # a GPU draws other random numbers
        assert run("generate", folders[kind], *prompt, "--device", "cpu")[1] == said


def test_a_model_computes_in_its_own_dtype_where_none_is_given(device, folders):
    for kind in folders:
        model, _, _ = load_any(str(folders[kind]), device)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {parameter.device for parameter in model.parameters()} == {device}
        assert next(load_any(str(folders[kind]), "cpu")[0].parameters()).dtype == torch.float32


def test_measures_take_ids_of_any_device(device, folders):
    """The ids on the CPU, the model on the device; and both on the device."""
    model = load_any(str(folders["float"]), device, torch.float32)[0]
    here = load_any(str(folders["float"]), "cpu")[0]
    prompts = prompt_windows(IDS, 4, 8)
    expected = greedy_tokens(here, prompts, 5)
    for ids in (IDS, IDS.to(device)):
        assert perplexity(model, ids, 16) == pytest.approx(perplexity(here, IDS, 16), rel=1e-5)
        starts = prompt_windows(ids, 4, 8)
        tokens = greedy_tokens(model, starts, 5)
        assert tokens.device == device
        assert torch.equal(tokens.cpu(), expected)
        for found in (tokens, expected):
            assert divergence(model, starts, found) == divergence(here, prompts, expected)
    assert [done for done, _ in decode_seconds({"a": model}, prompts[:1], 9)] == [8, 9]


def test_pipeline_functions_take_a_torch_device(device, folders, text):
    found = evaluate(folders["quantized"], text, tokens=64, window=16, device=device, dtype=torch.float16)
    assert (found.device, found.dtype) == (str(device), "float16")
    assert generate(folders["quantized"], "one two", new_tokens=3, device=device)
