"""rotate_model: the same function in every family, with every rotation."""

import copy
import pickle

import pytest
import torch
from rotated_models import IDS, NAMES, difference, logits, random_rotation, transformers
from torch import nn

from rcp_kernels import OnlineRotation, QuantLinear, quantize_model, sequency_permutation
from rcp_kernels.methods.rotate import ROTATIONS, Rotated, rotate_model
from rcp_kernels.models import describe
from rcp_kernels.models.hf import cache_argument
from rcp_kernels.nn import RotatedLinear

WITHIN = 1e-4  # difference of float32 logits. Usual is 1e-5; a forgotten bias or gain gives 1e-1
R1 = tuple(name for name in ROTATIONS if name != "none")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rotation", R1)
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay(name: str, rotation: str, models, expected) -> None:
    model = copy.deepcopy(models[name])
    record = rotate_model(model, rotation, group_size=32)
    assert (record.rotation, record.r2, record.r3, record.r4) == (rotation, True, True, True)
    assert difference(expected[name], logits(model)) <= WITHIN
    # The gains are one now. A tied head stays tied, so the final norm keeps its gain.
    architecture = describe(model)
    tied = models[name].lm_head.weight is models[name].model.embed_tokens.weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == record.tied
    assert model.config.tie_word_embeddings == tied
    norms = [architecture.layers[1].attention_norm, architecture.layers[0].mlp_norm]
    for norm in norms if tied else [*norms, architecture.final_norm]:
        assert torch.all(model.get_submodule(norm).weight + architecture.gain_offset == 1)
    was = models[name].get_submodule(architecture.layers[0].gate).weight
    assert difference(was, model.get_submodule(architecture.layers[0].gate).weight) > 0.1


@pytest.mark.parametrize("part", ["r2", "r3", "r4"])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "gsr"])
@pytest.mark.parametrize("name", NAMES)
def test_each_part_alone(name: str, rotation: str, part: str, models, expected) -> None:
    model = copy.deepcopy(models[name])
    rotate_model(model, rotation, group_size=32, **({"r2": False, "r3": False, "r4": False} | {part: True}))
    assert difference(expected[name], logits(model)) <= WITHIN
    layer = describe(model).layers[1]
    assert isinstance(model.get_submodule(layer.down), RotatedLinear) == (part == "r4")
    assert hasattr(model.get_submodule(layer.attention), "qk_rotation") == (part == "r3")
    if rotation == "none":
        changed = {
            key.split(".", 3)[-1].rpartition(".")[0]
            for key, value in model.state_dict().items()
            if not torch.equal(value, models[name].state_dict()[key])
        }
        assert (
            changed
            == {
                "r2": {"self_attn.v_proj", "self_attn.o_proj"},
                "r3": set(),
                "r4": {"mlp.down_proj"},
            }[part]
        )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("gemma2", "gemma3"))])
def test_given_matrix(name: str, models, expected) -> None:
    model = copy.deepcopy(models[name])
    size = model.config.hidden_size
    record = rotate_model(model, random_rotation(size), r4=False)
    assert (record.rotation, record.group_size, record.r4_group_size) == ("matrix", None, None)
    assert difference(expected[name], logits(model)) <= WITHIN


def test_matrix_is_that_of_online_rotation(models) -> None:
    one, two = copy.deepcopy(models["llama"]), copy.deepcopy(models["llama"])
    rotate_model(one, "walsh", r2=False, r3=False, r4=False)
    rotate_model(two, OnlineRotation(96).matrix(), r2=False, r3=False, r4=False)
    # 96 is no power of two, so R is not symmetric, and a transpose would fail.
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[key], rtol=1e-5, atol=1e-6, msg=key)


def test_none_leaves_the_model_alone(models) -> None:
    model = copy.deepcopy(models["gemma"])
    record = rotate_model(model, "none")
    assert record == Rotated("gemma", "none", None, False, False, False, None, 0, False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, models["gemma"].state_dict()[key]) for key, value in model.state_dict().items())


def test_biases_rotate(models) -> None:
    model = copy.deepcopy(models["llama"])
    rotate_model(model, "hadamard", r3=False, r4=False, seed=3)
    signs = torch.randint(2, (96,), generator=torch.Generator().manual_seed(3)) * 2 - 1
    r1 = OnlineRotation(96, order="natural", signs=signs).matrix()
    before, after = models["llama"].model.layers[1], model.model.layers[1]
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        was = before.get_submodule(module).bias.double()
        torch.testing.assert_close(after.get_submodule(module).bias.double(), r1 @ was, rtol=0, atol=1e-6)
    r2 = OnlineRotation(32, order="natural").matrix()
    was = before.self_attn.v_proj.bias.double()
    torch.testing.assert_close(after.self_attn.v_proj.bias.double(), r2 @ was, rtol=0, atol=1e-6)
    for module in ("self_attn.q_proj", "mlp.up_proj"):
        assert torch.equal(after.get_submodule(module).bias, before.get_submodule(module).bias)


def test_seed_draws_the_signs(models) -> None:
    weights = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(models["llama"])
        rotate_model(model, "hadamard", seed=seed)
        weights.append(model.model.embed_tokens.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_round_once(models) -> None:
    model = copy.deepcopy(models["llama"]).to(torch.bfloat16)
    layer = copy.deepcopy(model.model.layers[0])
    rotate_model(model, "gsr", group_size=32)
    r1, r2 = OnlineRotation(96, 32).matrix(), OnlineRotation(32).matrix()
    exact = r2 @ (layer.self_attn.v_proj.weight.double() * layer.input_layernorm.weight.double()) @ r1.T
    error = (model.model.layers[0].self_attn.v_proj.weight.double() - exact).abs()
    assert model.model.layers[0].self_attn.v_proj.weight.dtype == torch.bfloat16
    assert torch.all(error <= exact.abs() * 2.0**-8 + 1e-12)  # half a unit in bfloat16's last place


class Spy(transformers.DynamicCache):
    """A cache that records its keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.append(key_states)
        self.values.append(value_states)
        return super().update(key_states, value_states, *args, **kwargs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_cache_gets_rotated_keys_and_values(name: str, attention: str, models, expected) -> None:
    plain, model = models[name], copy.deepcopy(models[name])
    rotate_model(model, "gsr", group_size=32)
    model.set_attn_implementation(attention)
    caches = Spy(), Spy()
    with torch.no_grad():
        plain(input_ids=IDS, use_cache=True, **cache_argument(plain, caches[0]))
        first = model(input_ids=IDS[:, :5], use_cache=True, **cache_argument(model, caches[1])).logits
        rest = [
            model(input_ids=IDS[:, i : i + 1], use_cache=True, **cache_argument(model, caches[1])).logits
            for i in range(5, 12)
        ]
    assert difference(expected[name], torch.cat([first, *rest], 1)) <= WITHIN
    rotation = OnlineRotation(model.config.head_dim)
    for kind in ("keys", "values"):
        was, steps = getattr(caches[0], kind), getattr(caches[1], kind)
        for index in range(2):
            now = torch.cat(steps[index::2], dim=2)
            torch.testing.assert_close(now, rotation(was[index]), rtol=0, atol=1e-4)
            assert float((now - was[index]).abs().max()) > 0.1


def test_other_models_of_the_source_are_untouched(models, expected) -> None:
    other = copy.deepcopy(models["qwen2"])
    rotate_model(copy.deepcopy(models["qwen2"]), "gsr", group_size=32)
    assert torch.equal(logits(other), expected["qwen2"])


def test_copies_and_pickles_stay_rotated(models, expected) -> None:
    model = copy.deepcopy(models["gemma3_text"])
    rotate_model(model, "hadamard")
    rotated = logits(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone), rotated)
        # The copy has its own hooks.
        clone.model.layers[0].self_attn.qk_rotation = OnlineRotation(32, 8)
        clone.model.layers[0].post_attention_layernorm.output_rotation = OnlineRotation(96)
        assert not torch.equal(logits(clone), rotated)
        assert torch.equal(logits(model), rotated)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer versions of transformers have another name for it
def test_gradients_flow(models) -> None:
    model = copy.deepcopy(models["llama"]).train()
    rotate_model(model, "gsr", group_size=32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients.values()), gradients


def test_compiles_in_one_graph(models, expected) -> None:
    model = copy.deepcopy(models["llama"])
    rotate_model(model, "gsr", group_size=32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        after = compiled(input_ids=IDS, use_cache=False).logits
    assert difference(expected["llama"], after) <= WITHIN


# ---- quantized


def rounding_errors(model: nn.Module, rotation: str, levels: str) -> dict[str, float]:
    """The sum of squared errors of each layer after two-bit rounding."""
    model = copy.deepcopy(model)
    rotate_model(model, rotation, group_size=32)
    weights = {key: m.weight.detach().double() for key, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantize_model(model, bits=2, group_size=32, levels=levels)
    packed = {key: m.dequantize().double() for key, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(packed) == 14
    return {key: float((weight - weights[key]).square().sum()) for key, weight in packed.items()}


def test_local_hadamard_rounds_as_gsr(models) -> None:
    # Groups of 32, equal to the rotation's blocks and to head_dim: R2 stays inside the groups too.
    errors = {rotation: rounding_errors(models["qwen2"], rotation, "uniform") for rotation in R1}
    for key, error in errors["gsr"].items():
        assert errors["local_hadamard"][key] == pytest.approx(error, rel=1e-9), key
        assert errors["walsh"][key] != pytest.approx(errors["hadamard"][key], rel=1e-6), key
        assert errors["gsr"][key] != pytest.approx(errors["walsh"][key], rel=1e-6), key


def test_local_hadamard_weights_are_gsr_weights_permuted(models) -> None:
    local, gsr = copy.deepcopy(models["llama"]), copy.deepcopy(models["llama"])
    rotate_model(local, "local_hadamard", group_size=32)
    rotate_model(gsr, "gsr", group_size=32)
    quantize_model(local, bits=2, group_size=32, levels="uniform")
    quantize_model(gsr, bits=2, group_size=32, levels="uniform")
    order = sequency_permutation(32)
    for layer in describe(gsr).layers:
        for key in layer.linears:
            one, two = local.get_submodule(key).dequantize(), gsr.get_submodule(key).dequantize()
            columns = (torch.arange(one.shape[1]).view(-1, 32)[:, order]).flatten()
            rows = torch.arange(one.shape[0])
            if key in (layer.v, layer.o, layer.down):
                rows = rows.view(-1, 32)[:, order].flatten()
            assert torch.equal(one[rows][:, columns], two), key


def test_quantized_model_runs_the_rotation(models) -> None:
    model = copy.deepcopy(models["llama"])
    rotate_model(model, "gsr", group_size=32)
    rotated = copy.deepcopy(model)
    report = quantize_model(model, bits=4, group_size=32, act_bits=16, levels="uniform")
    assert len(report.layers) == 14
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, QuantLinear)
    assert down.input_rotation is not None
    # Compared with the float model of the same weights, only the rounding of activations differs.
    for key, module in model.named_modules():
        if isinstance(module, QuantLinear):
            with torch.no_grad():
                rotated.get_submodule(key).weight.copy_(module.dequantize())
    assert difference(logits(rotated), logits(model)) <= 1e-4
