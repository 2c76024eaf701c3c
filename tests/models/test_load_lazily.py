"""Models whose decoder weights are read layer by layer give the bits of models in memory."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from language_of_numbers import write_model  # noqa: E402
from rotated_models import NAMES, make_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from rcp_kernels import quantize_model  # noqa: E402
from rcp_kernels.methods.gptq import gptq_quantize_model  # noqa: E402
from rcp_kernels.methods.laquant import LaquantConfig, laquant_quantize_model  # noqa: E402
from rcp_kernels.methods.rotate import rotate_model  # noqa: E402
from rcp_kernels.models import describe  # noqa: E402
from rcp_kernels.models.lazy import values_of  # noqa: E402
from rcp_kernels.models.load import load_float, source_bytes  # noqa: E402
from rcp_kernels.models.load_lazily import can_load_lazily, load_lazily  # noqa: E402

IDS = torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(0))
LAQUANT = LaquantConfig(bits=3, group_size=32, epochs=1, batch_size=2)
METHODS = {
    "rtn": lambda model, device: quantize_model(model, 2, 32, device=device),
    "gptq": lambda model, device: gptq_quantize_model(model, IDS, bits=2, group_size=32, kv_bits=4, device=device),
    "laquant": lambda model, device: laquant_quantize_model(model, IDS, LAQUANT, device=device),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tokenizer"))


def written(name, tokenizer, folder):
    """A directory of a tiny model of a family, in bfloat16."""
    for path in tokenizer.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    make_model(name).to(torch.bfloat16).save_pretrained(folder)
    assert can_load_lazily(str(folder))
    return str(folder)


def assert_same(model, other):
    tensors, others = model.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_the_weights_of_the_files(name, tokenizer, tmp_path):
    folder = written(name, tokenizer, tmp_path)
    lazy, whole = load_lazily(folder)[0], load_float(folder)[0]
    linears = {f"{linear}.weight" for layer in describe(whole).layers for linear in layer.linears}
    assert {each for each, parameter in lazy.named_parameters() if parameter.is_meta} == linears
    for each, parameter in whole.named_parameters():
        found = lazy.get_parameter(each)
        assert found.dtype == torch.float32
        assert torch.equal(values_of(found), parameter), each
    for each, buffer in whole.named_buffers():
        assert torch.equal(lazy.get_buffer(each), buffer), each
    assert (lazy.get_output_embeddings().weight is lazy.get_input_embeddings().weight) == (
        whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_method_gives_the_bits_of_a_model_in_memory(name, method, tokenizer, tmp_path):
    folder = written(name, tokenizer, tmp_path)
    lazy, whole = load_lazily(folder)[0], load_float(folder)[0]
    for model in (lazy, whole):
        if method != "laquant":
            rotate_model(model, "hadamard", r4_group_size=32)
        METHODS[method](model, None)
    assert_same(whole, lazy)


def test_a_weight_is_rotated_where_it_is_read(tokenizer, tmp_path, device):
    if device.type != "emulated":
        pytest.skip("bit for bit on the emulated device only")
    folder = written("llama", tokenizer, tmp_path)
    lazy, whole = load_lazily(folder)[0], load_float(folder)[0]
    for model in (lazy, whole):
        rotate_model(model, "gsr", group_size=32, device=device)
        quantize_model(model, 2, 32, device=device)
    assert_same(whole, lazy)


def test_simulated_weights_are_in_memory(tokenizer, tmp_path):
    lazy = load_lazily(written("llama", tokenizer, tmp_path))[0]
    packed = gptq_quantize_model(lazy, IDS, bits=2, group_size=32, simulate=True)
    for name, weight in packed.items():
        assert torch.equal(lazy.get_submodule(name).weight, weight.dequantize())


def test_nan_is_refused_as_it_is_read(tokenizer, tmp_path):
    folder = written("llama", tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight must be finite"):
        quantize_model(load_lazily(folder)[0], 2, 32)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_files_that_do_not_fit_are_refused(damage, tokenizer, tmp_path):
    folder = written("llama", tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load_lazily(folder)


@pytest.mark.parametrize("size", ["10MB", "40KB"], ids=["whole", "sharded"])
def test_other_safetensors_files_of_the_directory_are_not_read(size, tokenizer, tmp_path):
    folder = written("llama", tokenizer, tmp_path)
    for path in tmp_path.glob("model*.safetensors*"):
        path.unlink()
    model = make_model("llama").to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=size)
    for name in ("model-00001-of-00099.safetensors", "zzz.safetensors"):
        save_file({key: value + 1 for key, value in model.state_dict().items()}, tmp_path / name)
    assert can_load_lazily(folder)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert stored < source_bytes(folder) < 1.5 * stored
    lazy, whole = load_lazily(folder)[0], load_float(folder)[0]
    for name, parameter in whole.named_parameters():
        assert torch.equal(values_of(lazy.get_parameter(name)), parameter), name


def test_a_damaged_index_is_named(tokenizer, tmp_path):
    folder = written("llama", tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        can_load_lazily(folder)
