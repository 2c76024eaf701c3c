"""The device memory of a dry run, against the bytes that the method takes on a device that counts them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rcp_kernels.methods.gptq import gptq_quantize_model  # noqa: E402
from rcp_kernels.methods.laquant import laquant_quantize_model  # noqa: E402
from rcp_kernels.methods.rcp import train  # noqa: E402
from rcp_kernels.nn import quantize_model  # noqa: E402
from rcp_kernels.pipeline import Recipe, dry_run  # noqa: E402

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SEQUENCE = 64
BLOCKS = {"sequences": 4, "epochs": 1, "batch": 2}
TRAINING = {"steps": 2, "batch": 2, "micro_batch": 1, "warmup": 1, "bf16": False, "blocks": None}


@pytest.fixture
def counted(device):
    """The bytes that a function allocates on the device at its peak."""
    if device.type != "emulated":
        pytest.skip("a GPU's allocator rounds the sizes of tiny tensors up")
    memory = torch.get_device_module(device)

    def peak(function):
        before = memory.memory_allocated()
        memory.reset_peak_memory_stats()
        function()
        return memory.max_memory_allocated() - before

    return peak


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, tmp_path_factory):
    config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[request.param]
    extra = {"head_dim": 64} if request.param == "qwen3" else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **extra)).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.config.save_pretrained(folder)
    return model, str(folder)


def ids(count, length=SEQUENCE):
    return torch.randint(SIZES["vocab_size"], (count, length), generator=torch.Generator().manual_seed(0))


def fresh(model):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"activation_checkpointing": True},
        {"batch": 1},
        {"steps": 0, "blocks": BLOCKS},
    ],
    ids=["plain", "checkpointing", "one micro-batch", "phase one"],
)
def test_rcp(counted, device, model, training):
    model, folder = model
    recipe = Recipe(folder, "rcp", group_size=64, sequence=SEQUENCE, rotation="none", training=TRAINING | training)
    expected = dry_run(recipe, device=device)
    found = fresh(model)
    if training.get("steps") == 0:
        phase_one_only(expected, recipe, counted, device, found)
        return
    config = recipe.training_config(64)
    bytes_ = counted(lambda: train(found, ids(8), ids(2), config, device=device))
    assert expected.device_bytes == pytest.approx(bytes_, rel=0.1)


def phase_one_only(expected, recipe, counted, device, model):
    from rcp_kernels.methods.rcp.block_reconstruction import reconstruct_blocks
    from rcp_kernels.methods.student import make_student
    from rcp_kernels.pipeline.rcp_memory import phase_one_bytes

    config = recipe.training_config(64)
    teacher = fresh(model)
    make_student(model, group_size=64, init="uniform")
    bytes_ = counted(lambda: reconstruct_blocks(model, teacher, ids(4), config.blocks, device=device))
    on_meta = fresh_on_meta(teacher)
    assert phase_one_bytes(on_meta, config, config.blocks, SEQUENCE, False).total() == pytest.approx(bytes_, rel=0.1)


def fresh_on_meta(model):
    return type(model)(model.config).eval().to("meta")


def test_gptq(counted, device, model):
    # k-means takes 45 bytes a weight for a part of a million weights, which only a tiny model notices.
    model, folder = model
    recipe = Recipe(folder, "gptq", group_size=64, levels="uniform", sequence=SEQUENCE, samples=8)
    found = fresh(model)
    bytes_ = counted(
        lambda: gptq_quantize_model(
            found, ids(8), bits=4, group_size=64, levels="uniform", device=device, device_budget=0
        )
    )
    assert dry_run(recipe, device=device).device_bytes == pytest.approx(bytes_, rel=0.1)


def test_laquant(counted, device, model):
    model, folder = model
    recipe = Recipe(folder, "laquant", group_size=64, sequence=SEQUENCE, samples=8, training={"dtype": "float32"})
    config = recipe.training_config(64)
    found = fresh(model)
    bytes_ = counted(lambda: laquant_quantize_model(found, ids(8), config, device=device, device_budget=0))
    assert dry_run(recipe, device=device).device_bytes == pytest.approx(bytes_, rel=0.1)


@pytest.mark.parametrize("levels", ["uniform", "kmeans"])
def test_rtn(counted, device, levels, tmp_path):
    large = SIZES | {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**large)).eval()
    model.config.save_pretrained(tmp_path)
    recipe = Recipe(str(tmp_path), "rtn", levels=levels)
    bytes_ = counted(lambda: quantize_model(model, 4, 128, 16, levels, device=device))
    assert dry_run(recipe, device=device).device_bytes == pytest.approx(bytes_, rel=0.1)
