"""quantize on a device that is not the CPU: every method writes the CPU's directory."""

import json
import sys

import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")

from language_of_numbers import write_model, write_text  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from rcp_kernels.data import by_name, corpus  # noqa: E402
from rcp_kernels.models.load import load_float  # noqa: E402
from rcp_kernels.ops import cuda_library  # noqa: E402
from rcp_kernels.pipeline import Recipe, quantize  # noqa: E402
from rcp_kernels.pipeline.quantize import _device_of_process  # noqa: E402
from rcp_kernels.pipeline.steps import quantize_layers, rotate, windows_of  # noqa: E402

command = sys.modules[quantize.__module__]

TRAINING = {
    "steps": 2,
    "batch": 2,
    "micro_batch": 1,
    "warmup": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
    "bf16": False,
    "blocks": {"sequences": 2, "epochs": 1, "batch": 1},
}
METHODS = {
    "rtn": {"rotation": "gsr", "a_bits": 4, "kv_bits": 4},
    "gptq": {"rotation": "hadamard", "a_bits": 4, "kv_bits": 4, "samples": 4},
    "rcp": {"training": TRAINING},
    "laquant": {"samples": 4, "training": {"dtype": "float32", "epochs": 1}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "numbers.txt")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_the_directory_of_the_cpu(run, device, model, text, tmp_path, method):
    fields = {"method": method, "group_size": 32, "dtype": "float32", **METHODS[method]}
    if method != "rtn":
        fields |= {"text": str(text), "sequence": 16}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    found = {}
    for name in ("cpu", str(device)):
        out = tmp_path / torch.device(name).type
        code, _, err = run("quantize", model, "-o", out, "--recipe", tmp_path / "recipe.yaml", "--device", name)
        assert code == 0, err
        assert f", on {name}" in err
        assert json.loads((out / "report.json").read_text())["device"] == name
        assert not out.with_name(out.name + ".training").exists()
        found[name] = load_file(out / "model.safetensors"), (out / "recipe.yaml").read_text()
    (here, recipe), (there, same_recipe) = found["cpu"], found[str(device)]
    assert same_recipe == recipe
    assert set(there) == set(here)
    for name, tensor in here.items():
        if tensor.is_floating_point():  # attention runs another kernel there, whose sums are rounded otherwise
            torch.testing.assert_close(there[name], tensor, rtol=2e-3, atol=1e-4)
        elif device.type != "cuda":  # the emulated device runs the CPU's kernels; a GPU's sums may move single codes
            assert torch.equal(there[name], tensor), name


@pytest.mark.parametrize("method", ["rcp", "laquant"])
def test_trainings_in_bfloat16(device, model, text, tmp_path, method):
    training = {"bf16": True} if method == "rcp" else {"dtype": "bfloat16"}
    training = {**METHODS[method]["training"], **training}
    recipe = Recipe(str(model), method, group_size=32, text=str(text), sequence=16, training=training)
    quantize(recipe, tmp_path / "out", device=device)
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["training"]
    assert written["bf16" if method == "rcp" else "dtype"] in (True, "bfloat16")


@pytest.mark.parametrize("method", ["rtn", "gptq", "laquant"])
def test_the_model_stays_on_the_cpu_and_its_head_tied(device, method):
    """The device holds a layer or two, and never the model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    total = sum(parameter.nbytes for parameter in model.parameters())
    fields = {name: value for name, value in METHODS[method].items() if name != "samples"}
    recipe = Recipe("tiny", method, group_size=32, **fields).resolve(model, device)
    module = torch.get_device_module(device)
    before = module.memory_allocated()
    module.reset_peak_memory_stats()
    rotate(model, recipe, device)
    quantize_layers(model, recipe, torch.randint(64, (2, 8)), device=device)
    assert 0 < module.max_memory_allocated() - before < total / 2
    assert module.memory_allocated() - before < 4096  # the tables of transforms stay cached
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture
def few_documents(monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_CACHE_DIR", str(tmp_path / "cache"))
    documents = corpus.Corpus(tuple(f"{i} one two three four five six seven " * 20 for i in range(30)), 0)
    for kind in ("docstring", "comment"):
        monkeypatch.setattr(corpus, f"{kind}_corpus", lambda: documents)
    monkeypatch.setattr(corpus, "without_overlap", lambda texts, **_: corpus.Corpus(tuple(texts), 0))


@pytest.mark.usefixtures("few_documents")
def test_the_model_writes_its_text_on_the_device(device, model, tmp_path, monkeypatch):
    """The model itself stays where it is; texts of the CPU and of the device are cached apart."""
    loaded, tokenizer = load_float(str(model))
    devices = []
    original = by_name.generate_texts

    def generate_texts(model, *arguments, **options):
        devices.append(next(model.parameters()).device)
        return original(model, *arguments, **options)

    monkeypatch.setattr(by_name, "generate_texts", generate_texts)
    recipe = Recipe(str(model), text="generated", sequence=8, samples=2)
    for where in (device, torch.device("cpu"), device):
        ids, _ = windows_of(recipe, tokenizer, loaded, device=where)
        assert ids.device.type == "cpu"
    assert devices == [device, torch.device("cpu")]
    assert next(loaded.parameters()).device.type == "cpu"


def test_missing_cuda_kernels_are_named_before_a_model_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("read the model"))
    monkeypatch.setattr(cuda_library, "MISSING", "no kernels here")
    with pytest.raises(RuntimeError, match=r"^quantize: .*no kernels here"):
        quantize(Recipe("no such model", "rtn", a_bits=8), tmp_path / "out", device="cuda")


def test_under_torchrun_each_process_takes_the_device_of_its_rank(device, monkeypatch):
    assert _device_of_process(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _device_of_process(torch.device("cpu")) == torch.device("cpu")
    assert _device_of_process(torch.device(device.type)) == torch.device(device.type, 1)
    with pytest.raises(ValueError, match=f"no index.*got {device}; pass {device.type}"):
        _device_of_process(device)
