"""The vLLM plugin through the calls that vLLM makes: of vLLM's own classes where it is installed, else of a stand-in.

vLLM's wheels bring no kernels for a CPU, so no engine runs here: layers are made, loaded rank by rank and called.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import vllm_contract
from rotated_models import make_model
from safetensors.torch import load_file

with contextlib.nullcontext() if importlib.util.find_spec("vllm") else vllm_contract.installed():
    from vllm.model_executor.layers import linear as vllm_linear
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from rcp_kernels.integrations import vllm as plugin

from rcp_kernels import PackedWeight, QuantLinear, quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, read_quantization_config, save_quantized
from rcp_kernels.formats import pack_codes, unpack_codes
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.methods.uniform import UniformQuantizer

BLOCK = "model.layers.1"
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
COLUMN = ("self_attn.qkv_proj", "mlp.gate_up_proj")
ROW = ("self_attn.o_proj", "mlp.down_proj")
LAYERS = (*COLUMN, *ROW)


def quantized(bits=3, act_bits=16, rotation="gsr", scale_of=None, **rotate):
    """A model with four heads on two of keys and values, biases in attention, and R4; groups of 32."""
    model = make_model("qwen3")
    for name, factor in (scale_of or {}).items():
        model.get_submodule(f"{BLOCK}.{name}").weight.data *= factor
    record = None if rotation == "none" else rotate_model(model, rotation, group_size=32, untie=True, **rotate)
    quantize_model(model, bits, 32, act_bits)
    return model, QuantizationConfig(bits, 32, act_bits, rotation=record)


def plugin_config(stored):
    """As vLLM makes it: of config.json's fields, after the plugin was loaded."""
    plugin.register()
    config = get_quantization_config("rcp").from_config(stored.to_dict())
    config.packed_modules_mapping = MERGED
    return config


@pytest.fixture
def ranks(monkeypatch):
    """Sets the rank and the number of ranks for vLLM's layers. The test sums over ranks."""

    def pretend(rank, size):
        for module in {vllm_linear.__name__, "vllm.model_executor.parameter"}:
            with contextlib.suppress(ImportError):
                monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: rank)
                monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda x: x)

    pretend(0, 1)
    return pretend


def make_layer(model, config, name):
    """vLLM's layer, as its llama and qwen models make it."""
    sizes = model.config
    prefix = f"{BLOCK}.{name}"
    common = {"quant_config": config, "prefix": prefix, "return_bias": False}
    bias = model.get_submodule(f"{BLOCK}.self_attn.q_proj").bias is not None and "attn" in name
    hidden, wide, heads = sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads
    if name == "self_attn.qkv_proj":
        return vllm_linear.QKVParallelLinear(
            hidden, sizes.head_dim, heads, sizes.num_key_value_heads, bias=bias, **common
        )
    if name == "mlp.gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(hidden, [wide, wide], bias=bias, **common)
    inputs = heads * sizes.head_dim if name == "self_attn.o_proj" else wide
    return vllm_linear.RowParallelLinear(inputs, hidden, bias=bias, **common)


def checkpoint(model, name, state=None):
    """The tensors of a layer of vLLM: (name in that layer, tensor, shard or None), as its loaders hand them out.

    Those of the model, or of files that it was written to.
    """
    state = model.state_dict() if state is None else state
    folder, _, last = name.partition(".")
    for part in MERGED.get(last, [last]):
        prefix = f"{BLOCK}.{folder}.{part}."
        for key in sorted(key for key in state if key.startswith(prefix)):
            yield key.removeprefix(prefix), state[key], SHARDS.get(part)


def load(layer, tensors):
    for name, tensor, shard in tensors:
        parameter = dict(layer.named_parameters())[name]
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def loaded(model, config, name):
    return load(make_layer(model, config, name), checkpoint(model, name))


def inputs(model, name, dtype=torch.bfloat16):
    part = model.get_submodule(f"{BLOCK}.{name.partition('.')[0]}").get_submodule(
        MERGED.get(name.partition(".")[2], [name.partition(".")[2]])[0]
    )
    return torch.randn(5, part.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)


def parts(model, name):
    folder, _, last = name.partition(".")
    return [model.get_submodule(f"{BLOCK}.{folder}.{part}") for part in MERGED.get(last, [last])]


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_one_rank_gives_the_bits_of_the_quantized_layers(ranks, name, act_bits):
    model, stored = quantized(2 if act_bits == 4 else 3, act_bits)
    layer = loaded(model, plugin_config(stored), name)
    x = inputs(model, name)
    expected = torch.cat([part(x) for part in parts(model, name)], -1)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    # The canonical tensors are gone, and the packed ones move with the model.
    assert set(dict(layer.named_parameters())) <= {"bias"}
    assert [type(part) for part in layer.rcp] == [QuantLinear]


@pytest.mark.parametrize("act_bits", [4, 16])
@pytest.mark.parametrize(("name", "size"), [(COLUMN[0], 2), (COLUMN[0], 4), (COLUMN[1], 2), (COLUMN[1], 4)])
def test_column_parallel_ranks_give_the_bits_of_one(ranks, name, size, act_bits):
    model, stored = quantized(act_bits=act_bits)
    x = inputs(model, name)
    found = []
    for rank in range(size):
        ranks(rank, size)
        found.append(loaded(model, plugin_config(stored), name)(x))
    # On four ranks each of the two heads of keys and values is on two.
    repeats = [1, 2, 2] if (name, size) == (COLUMN[0], 4) else [1, 1, 1]
    start = 0
    for part, repeat in zip(parts(model, name), repeats, strict=False):
        rows = part.out_features * repeat // size
        columns = [y[:, start : start + rows] for y in found][::repeat]
        assert torch.equal(torch.cat(columns, -1), part(x))
        start += rows
    assert start == found[0].shape[1]


def cut(linear, rank, size):
    """What a rank has of a layer, cut out of the codes themselves: columns, not bytes."""
    weight, per_rank = linear.packed_weight(), linear.in_features // size
    columns = slice(rank * per_rank, (rank + 1) * per_rank)
    groups = slice(columns.start // 32, columns.stop // 32)
    codes = unpack_codes(weight.codes, weight.in_features, weight.bits, 32)[:, columns]
    return dataclasses.replace(
        weight,
        codes=pack_codes(codes.contiguous(), weight.bits, 32),
        levels=weight.levels[:, groups].contiguous(),
        scales=weight.scales[:, groups].contiguous(),
        in_features=per_rank,
    )


@pytest.mark.parametrize("act_bits", [4, 16])
@pytest.mark.parametrize("name", ROW)
def test_row_parallel_ranks_sum_to_one(ranks, name, act_bits):
    model, stored = quantized(act_bits=act_bits)
    (linear,) = parts(model, name)
    x = inputs(model, name, torch.float32)
    rotation = linear.input_rotation
    rotated = x if rotation is None else rotation(x)
    total = torch.zeros(5, linear.out_features)
    for rank in range(2):
        ranks(rank, 2)
        layer = loaded(model, plugin_config(stored), name)
        half = slice(rank * x.shape[1] // 2, (rank + 1) * x.shape[1] // 2)
        found = layer(x[:, half])
        # The product with its inputs, with the bias on the first rank only.
        bias = linear.bias if rank == 0 else None
        alone = QuantLinear.from_packed(cut(linear, rank, 2), bias, act_bits)
        assert torch.equal(found, alone(rotated[:, half]))
        total += found
    assert (linear.bias is not None) == (name == ROW[0])
    if act_bits == 16:  # nothing is quantized per rank: the same sum in another order
        torch.testing.assert_close(total, linear(x), rtol=0, atol=1e-5 * float(linear(x).detach().abs().max()))


def test_parts_with_other_scales_are_merged_where_that_is_exact(ranks):
    for factor, count in ((2.0**-9, 1), (2.0**-30, 3)):
        model, stored = quantized(scale_of={"self_attn.k_proj": factor}, rotation="none")
        scales = [float(part.packed_weight().tensor_scale) for part in parts(model, COLUMN[0])]
        assert scales[1] < scales[0]
        layer = loaded(model, plugin_config(stored), COLUMN[0])
        assert len(layer.rcp) == count
        x = inputs(model, COLUMN[0])
        assert torch.equal(layer(x), torch.cat([part(x) for part in parts(model, COLUMN[0])], -1))


def test_evenly_spaced_levels_without_tables(ranks):
    """Weights of kind "uniform" have one level a group and a longer format."""
    model = make_model("qwen3")
    for part in ("gate_proj", "up_proj", "down_proj"):
        linear = model.get_submodule(f"{BLOCK}.mlp.{part}")
        quantizer = UniformQuantizer(linear.weight.shape, 3, 32)
        quantizer.init_uniform(linear.weight)
        model.set_submodule(f"{BLOCK}.mlp.{part}", QuantLinear.from_packed(quantizer.export(linear.weight), act_bits=8))
    config = plugin_config(QuantizationConfig(3, 32, 8))
    x = inputs(model, COLUMN[1])
    expected = torch.cat([part(x) for part in parts(model, COLUMN[1])], -1)
    layer = loaded(model, config, COLUMN[1])
    assert [part.kind for part in layer.rcp] == ["uniform"]
    assert torch.equal(layer(x), expected)
    ranks(1, 2)
    (linear,) = parts(model, ROW[1])
    x = inputs(model, ROW[1])[:, 96:]
    assert torch.equal(loaded(model, config, ROW[1])(x), QuantLinear.from_packed(cut(linear, 1, 2), None, 8)(x))

    ranks(0, 1)
    gate, up = parts(model, COLUMN[1])
    for mixed in ("gate_proj", "up_proj"):
        layers = {"gate_proj": gate, "up_proj": up}
        table = QuantLinear.from_packed(layers[mixed].packed_weight().as_table(), act_bits=8)
        model.set_submodule(f"{BLOCK}.mlp.{mixed}", table)
        with pytest.raises(ValueError, match=r"gate_up_proj: levels must be .* in all parts of the layer.* got \["):
            loaded(model, config, COLUMN[1])
        model.set_submodule(f"{BLOCK}.mlp.{mixed}", layers[mixed])


def test_what_stays_in_floating_point(ranks):
    model, stored = quantized()
    kept = (*stored.modules_to_not_convert, f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj")
    config = plugin_config(dataclasses.replace(stored, modules_to_not_convert=kept))
    layer = make_layer(model, config, "mlp.gate_up_proj")
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)
    assert isinstance(make_layer(model, config, "mlp.down_proj").quant_method, plugin.RcpLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(3, 3), "lm_head") is None
    assert config.get_quant_method(torch.nn.Identity(), f"{BLOCK}.self_attn.attn") is None
    some = plugin_config(dataclasses.replace(stored, modules_to_not_convert=("lm_head", f"{BLOCK}.mlp.up_proj")))
    with pytest.raises(
        ValueError, match=r"must be packed or none, .* got \['model.layers.1.mlp.up_proj'\] in floating"
    ):
        make_layer(model, some, "mlp.gate_up_proj")
    with pytest.raises(ValueError, match=r"lm_head must be among modules_to_not_convert for vLLM, got \[\]"):
        plugin_config(dataclasses.replace(stored, modules_to_not_convert=())).get_quant_method(
            torch.nn.Embedding(3, 3), "lm_head"
        )


def test_names_follow_vllms(ranks):
    class Mapper:
        def apply_list(self, names):
            return [name.replace("model.", "language_model.model.") for name in names]

    config = plugin_config(QuantizationConfig(3, 32, modules_to_not_convert=("lm_head", f"{BLOCK}.mlp.down_proj")))
    config.apply_vllm_mapper(Mapper())
    layer = vllm_linear.RowParallelLinear(
        192, 96, bias=False, quant_config=config, prefix=f"language_model.{BLOCK}.mlp.down_proj"
    )
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)


def test_cuts_inside_a_group_are_refused(ranks):
    model, stored = quantized()
    ranks(0, 4)
    with pytest.raises(
        ValueError,
        match=r"down_proj: group_size must divide the 48 inputs of a rank, got 32: the 192 inputs would be cut inside "
        r"a group; use another tensor_parallel_size",
    ):
        make_layer(model, plugin_config(stored), "mlp.down_proj")
    model, stored = quantized(rotation="walsh")
    make_layer(model, plugin_config(stored), "self_attn.o_proj")
    ranks(0, 2)
    with pytest.raises(ValueError, match="down_proj: r4_group_size must divide the 96 inputs of a rank, got 192"):
        make_layer(model, plugin_config(stored), "mlp.down_proj")


def change(model, name, key, value, part=None):
    """The tensors of a layer, one of them another."""
    return [
        (entry, value(tensor) if entry == key and shard == part else tensor, shard)
        for entry, tensor, shard in checkpoint(model, name)
    ]


def entry(index, value):
    def put(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return put


@pytest.mark.parametrize(
    ("name", "key", "part", "value", "message"),
    [
        (COLUMN[0], "scales", "k", lambda t: t.float(), "qkv_proj: scales must be torch.float16, got torch.float32"),
        (COLUMN[0], "scales", "k", entry((3, 1), -1), r"qkv_proj: .*scales must be finite and >= 0, got -1"),
        (COLUMN[0], "levels", "v", lambda t: t.flip(-1), "qkv_proj: .*levels must be ascending"),
        (COLUMN[1], "format", 1, entry(0, 7), "gate_up_proj: .*version must be 1.*, got 7; .*upgrade"),
        (COLUMN[1], "format", 1, lambda t: torch.cat([t, t[:1]]), "gate_up_proj: .*format .*has 5 entries, got 6"),
        (COLUMN[1], "format", 0, entry(1, 2), r"gate_up_proj: .* must be \(3, 32, 96\), .* got \(2, 32, 96\)"),
        (COLUMN[1], "format", 0, entry(4, 96), "out_features 192 times at most 1, got .* and 96"),
        (ROW[1], "format", None, entry(3, 96), r"down_proj: .* must be \(3, 32, 192\), .* got \(3, 32, 96\)"),
        (ROW[1], "tensor_scale", None, lambda t: t * 0.7, "down_proj: .*tensor_scale must be"),
        (ROW[1], "rotation", None, entry(1, 96), "down_proj: rotation must be of the 192 inputs"),
        (ROW[1], "rotation", None, entry(0, 2), "version must be 1, got 2"),
    ],
)
def test_other_tensors_are_refused(ranks, name, key, part, value, message):
    model, stored = quantized()
    layer = make_layer(model, plugin_config(stored), name)
    with pytest.raises(ValueError, match=message):
        load(layer, change(model, name, key, value, part))


@pytest.mark.parametrize("key", ["codes", "scales", "tensor_scale", "format"])
def test_a_missing_tensor_is_refused(ranks, key):
    model, stored = quantized()
    layer = make_layer(model, plugin_config(stored), COLUMN[0])
    tensors = [item for item in checkpoint(model, COLUMN[0]) if (item[0], item[2]) != (key, "k")]
    with pytest.raises(ValueError, match=f"must have {key} of all 3 parts of the layer, got 2"):
        load(layer, tensors)


def test_one_tensor_for_all_parts_is_refused(ranks):
    model, stored = quantized()
    layer = make_layer(model, plugin_config(stored), COLUMN[1])
    codes = torch.cat([part.packed_weight().codes for part in parts(model, COLUMN[1])])
    with pytest.raises(ValueError, match="codes must come in 2 parts, got one tensor of all"):
        load(layer, [("codes", codes, None)])


def test_a_rotation_that_vllm_cannot_run_is_refused():
    model = make_model("gemma2")
    record = rotate_model(model, "gsr", group_size=32, untie=True)
    stored = QuantizationConfig(3, 32, rotation=record)
    with pytest.raises(ValueError, match="rotation must be none for a model of type 'gemma2' in vLLM, got 'gsr'"):
        plugin_config(stored)
    # R4 alone is down's own.
    plugin_config(dataclasses.replace(stored, rotation=dataclasses.replace(record, rotation="none")))


def test_an_input_order_is_refused(ranks):
    with pytest.raises(
        ValueError, match=r"format_version must be below 3 in vLLM, got 3: a layer .* has an input_order"
    ):
        plugin_config(QuantizationConfig(3, 32, format_version=3))
    model, stored = quantized()
    layer = make_layer(model, plugin_config(stored), ROW[0])
    tensors = [
        (key, torch.cat([torch.tensor([3]), tensor[1:], torch.tensor([0])[: 6 - len(tensor)]]), shard)
        if key == "format"
        else (key, tensor, shard)
        for key, tensor, shard in checkpoint(model, ROW[0])
    ]
    with pytest.raises(ValueError, match=r"o_proj: format must be of a version below 3, got 3: .* has an input_order"):
        load(layer, tensors)


@pytest.mark.parametrize("writer", ["save_quantized", "save_pretrained", "shards", "lost bias"])
def test_what_every_writer_wrote_is_read(ranks, tmp_path, writer):
    """vLLM makes its layers of config.json: a bias that a layer lacks must be in the files all the same."""
    model, stored = quantized()
    if writer == "save_quantized":
        save_quantized(model, tmp_path, stored)
    else:
        if writer == "lost bias":
            for part in parts(model, COLUMN[0]):
                part.bias = None
        model.save_pretrained(tmp_path, max_shard_size="20KB" if writer == "shards" else "1GB")
    state = {}
    for path in tmp_path.glob("*.safetensors"):
        state.update(load_file(path))
    assert ("model.safetensors" in {path.name for path in tmp_path.iterdir()}) == (writer != "shards")
    _, found = read_quantization_config(tmp_path)
    fresh, _ = quantized()  # with every bias, as vLLM's layers have it
    for name in LAYERS:
        layer = load(make_layer(fresh, plugin_config(found), name), checkpoint(model, name, state))
        x = inputs(model, name)
        with torch.inference_mode():
            assert torch.equal(layer(x), torch.cat([part(x) for part in parts(model, name)], -1))


def test_a_directory_is_what_config_json_says(tmp_path):
    model, stored = quantized()
    save_quantized(model, tmp_path / "model", stored)
    _, stored = read_quantization_config(tmp_path / "model")
    assert plugin_config(stored).stored == stored
    with pytest.raises(ValueError, match="format_version must be 1 to 3, got 7"):
        get_quantization_config("rcp").from_config({**stored.to_dict(), "format_version": 7})


def test_the_entry_point_registers_once_however_often():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    value = re.search(r'\[project.entry-points."vllm.general_plugins"\]\n\w+ = "(.*)"', text)[1]
    function = importlib.metadata.EntryPoint("rcp_kernels", value, "vllm.general_plugins").load()
    assert function is plugin.register
    function()
    function()
    assert QUANTIZATION_METHODS.count("rcp") == 1
    config = get_quantization_config("rcp")
    assert config is plugin.RcpQuantizationConfig
    assert config.get_min_capability() == 75
    assert config.get_config_filenames() == []
    assert torch.bfloat16 in plugin_config(QuantizationConfig(3, 32)).get_supported_act_dtypes()
    assert plugin_config(QuantizationConfig(3, 32)).get_name() == "rcp"


def test_layers_compile_into_one_graph(ranks):
    model, stored = quantized(act_bits=8)
    layer = loaded(model, plugin_config(stored), ROW[1])
    x = inputs(model, ROW[1], torch.float32)
    compiled = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))


def test_weights_are_canonical_until_they_are_packed(ranks):
    """What other tools of vLLM (memory estimates, weight caches) see before the weights are packed."""
    model, stored = quantized(2)
    ranks(1, 2)
    layer = make_layer(model, plugin_config(stored), ROW[1])
    for name, tensor, _ in checkpoint(model, ROW[1]):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    (linear,) = parts(model, ROW[1])
    expected = cut(linear, 1, 2)
    for name in ("codes", "levels", "scales"):
        assert torch.equal(getattr(layer, name).data, getattr(expected, name))
    assert isinstance(expected.validate(), PackedWeight)
