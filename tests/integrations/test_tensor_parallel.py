"""Tensor parallel layers in two gloo processes, and the slices of a packed weight that they are made of."""

import datetime
import os

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, ops
from rcp_kernels.bench.lut_linear import random_packed_weight
from rcp_kernels.integrations.tensor_parallel import RcpColwiseParallel, RcpRowwiseParallel
from rcp_kernels.nn.sharding import shard_columns, shard_rows
from rcp_kernels.ops.lut_linear import lut_linear_group_sums_reference

WORLD = 2
SECONDS = 120

# name: (out_features, in_features, bits, group_size, act_bits, act_clip, bias, rotation, dtype of x)
COLUMN = {
    "W3A8 with an input order": (24, 96, 3, 32, 8, 0.9, True, "order", torch.bfloat16),
    "W2A4": (96, 160, 2, 32, 4, 1.0, True, None, torch.float32),
    "W3A8 bfloat16, one group a row": (10, 77, 3, 77, 8, 0.9, True, None, torch.bfloat16),
    "W4A16 float16": (6, 64, 4, 64, 16, 1.0, False, None, torch.float16),
    "W2A4 rotated over all inputs": (32, 96, 2, 32, 4, 0.9, True, {}, torch.bfloat16),
    "SmolLM2 up_proj": (1536, 576, 2, 64, 4, 1.0, False, None, torch.bfloat16),
}
ROW = {
    "W2A4": (48, 192, 2, 32, 4, 1.0, True, None, torch.float32),
    "W3A8": (48, 128, 3, 64, 8, 1.0, False, None, torch.float32),
    "W4A4, clipped": (33, 256, 4, 128, 4, 0.5, True, None, torch.float32),
    "W2A8, clipped": (33, 256, 2, 32, 8, 0.5, True, None, torch.bfloat16),
    "W3A16": (48, 192, 3, 32, 16, 1.0, True, None, torch.float32),
    "W4A16 bfloat16": (48, 192, 4, 32, 16, 1.0, True, None, torch.bfloat16),
    "W2A4 rotated in groups": (48, 192, 2, 32, 4, 1.0, True, {"group_size": 32}, torch.float32),
    "W4A8 rotated with signs": (16, 128, 4, 32, 8, 1.0, False, "signs", torch.bfloat16),
    "W4A4 rotated across heads": (16, 128, 4, 32, 4, 1.0, False, {"heads": 8, "group_size": 4}, torch.float32),
    "SmolLM2 down_proj": (576, 1536, 2, 64, 4, 1.0, False, None, torch.bfloat16),
}


def make(case):
    """The whole layer of a case and its input, the same on every rank and in the test."""
    out_features, in_features, bits, group_size, act_bits, clip, with_bias, rotation, dtype = case
    torch.manual_seed(0)
    order = torch.randperm(in_features) if rotation == "order" else None
    if order is not None:
        rotation = None
    if rotation == "signs":
        rotation = {"group_size": 64, "order": "natural", "signs": torch.randint(2, (in_features,)) * 2 - 1}
    if rotation is not None:
        rotation = OnlineRotation(in_features, **rotation)
    bias = nn.Parameter(torch.randn(out_features)) if with_bias else None
    weight = random_packed_weight(out_features, in_features, bits, group_size)
    layer = QuantLinear.from_packed(weight, bias, act_bits, clip, rotation, order)
    x = torch.randn(2, 3, in_features)
    x[0, 0, in_features // 2 :] *= (
        100  # this token's largest magnitude is the second rank's, the next one's the first's
    )
    x[0, 1, : in_features // 2] *= 100
    x[1, 2] = 0
    return layer, x.to(dtype)


def mlp(parallel=None):
    """SmolLM2's gated MLP, W2A4 in groups of 64."""
    torch.manual_seed(1)
    shapes = {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    layers = {name: QuantLinear.from_packed(random_packed_weight(*shape, 2, 64)) for name, shape in shapes.items()}
    module = nn.ModuleDict(layers)
    x = torch.randn(1, 5, 576).bfloat16()
    if parallel is not None:
        column = RcpColwiseParallel
        parallelize_module(module, parallel, {"gate": column(), "up": column(), "down": RcpRowwiseParallel()})
    return module["down"](nn.functional.silu(module["gate"](x)) * module["up"](x))


def error(call):
    try:
        call()
    except (TypeError, ValueError) as found:
        return f"{type(found).__name__}: {found}"
    return "no error"


def rank_main(rank, folder):
    """What each process computes, for the tests to look at."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    found = {}
    with torch.inference_mode():
        for name, case in COLUMN.items():
            layer, x = make(case)
            gathered = parallelize_module(layer, mesh, RcpColwiseParallel(output_layouts=Replicate()))(x)
            layer, _ = make(case)
            own = parallelize_module(nn.ModuleDict({"q_proj": layer}), mesh, {"*_proj": RcpColwiseParallel()})
            found["column", name] = gathered, own["q_proj"](x)
        for name, case in ROW.items():
            layer, x = make(case)
            parallelize_module(layer, mesh, RcpRowwiseParallel())
            half = x.chunk(WORLD, -1)[rank]
            found["row", name] = layer(half), layer(half)
        found["mlp"] = mlp(mesh)
        for style, case in ((RcpColwiseParallel, COLUMN["W2A4"]), (RcpRowwiseParallel, ROW["W2A4"])):
            layer, x = make(case)
            layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
            parallelize_module(layer, mesh, style(**layouts))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found["autocast", style.__name__] = layer(x)

        layer, x = make(ROW["W2A4"])
        parallelize_module(layer, mesh, RcpRowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)))
        found["tokens scattered"] = layer(x)
        half = x.chunk(WORLD, -1)[rank].clone()
        layer, _ = make(ROW["W2A4"])
        parallelize_module(layer, mesh, RcpRowwiseParallel(use_local_output=False))
        out = layer(DTensor.from_local(half, mesh, (Shard(2),)))
        found["dtensor"] = isinstance(out, DTensor), out.full_tensor()
        found["state"] = layer.state_dict()
        if rank == 1:
            half[0, 1, 3] = torch.nan
        found["no tokens"] = layer(half[:0]).full_tensor().shape
        found["nan"] = error(lambda: layer(half))

        found["bad input"] = [error(lambda x=x: layer(x)) for x in (half[..., :64], half.double(), half.int())]
        for style in (RcpColwiseParallel(), RcpRowwiseParallel(input_layouts=Replicate())):
            for width in (64, 96, 128):
                fresh, _ = make(ROW["W3A16"])
                parallelize_module(fresh, mesh, style)
                found["bad input"].append(error(lambda fresh=fresh, width=width: fresh(torch.zeros(2, width))))

        wide, _ = make(COLUMN["W2A4"])
        hooked = QuantLinear(64, 8, 2, 32)
        hooked.register_forward_hook(lambda *_: None)
        ordered, _ = make(COLUMN["W3A8 with an input order"])
        mixed = QuantLinear(128, 8, 2, 64, input_rotation=OnlineRotation(128))
        found["errors"] = [
            error(lambda: parallelize_module(wide, mesh, RcpRowwiseParallel())),
            error(lambda: parallelize_module(mixed, mesh, RcpRowwiseParallel())),
            error(lambda: parallelize_module(QuantLinear(32, 7, 2, 32), mesh, RcpColwiseParallel())),
            error(lambda: parallelize_module(nn.Linear(4, 4), mesh, RcpColwiseParallel())),
            error(lambda: parallelize_module(QuantLinear(64, 8, 2, 32, device="meta"), mesh, RcpRowwiseParallel())),
            error(lambda: parallelize_module(hooked, mesh, RcpColwiseParallel())),
            error(lambda: parallelize_module(ordered, mesh, RcpRowwiseParallel())),
        ]
        found["untouched"] = type(wide) is QuantLinear

    for style, case in ((RcpColwiseParallel, COLUMN["W2A4"]), (RcpRowwiseParallel, ROW["W2A4"])):
        layer, x = make(case)
        replicated = {"input_layouts": Replicate(), "output_layouts": Replicate()}
        parallelize_module(layer, mesh, style(**replicated))
        x.requires_grad_()
        layer(x).square().sum().backward()
        bias = layer.bias if style is RcpRowwiseParallel else layer.shard.bias
        found["gradients", style.__name__] = x.grad, bias.grad
    torch.save(found, f"{folder}/{rank}.pt")
    # A process that leaves while the other one still talks to it is aborted now and then.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What rank 0 and rank 1 found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.start_processes(rank_main, (str(folder),), WORLD, join=False, start_method="spawn")
    try:
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=2 * SECONDS)
        while not context.join(timeout=5):
            assert datetime.datetime.now() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", COLUMN)
def test_column_parallel_is_bit_equal(ranks, name):
    layer, x = make(COLUMN[name])
    with torch.inference_mode():
        expected = layer(x)
    for rank, found in enumerate(ranks):
        gathered, own = found["column", name]
        assert torch.equal(gathered, expected)
        assert torch.equal(own, expected.chunk(WORLD, -1)[rank])


def row_reference(layer, x):
    """float64 result, and the magnitude of all that is summed, of the undivided layer."""
    weight = layer.packed_weight()
    x = x.detach()
    if layer.input_rotation is not None:
        x = layer.input_rotation(x)
    y = ops.reference.lut_linear(x, weight, layer.bias, layer.act_bits, layer.act_clip)
    tokens = x.reshape(-1, layer.in_features)
    if layer.act_bits == 16:
        magnitude = tokens.double().abs() @ weight.dequantize().double().abs().T
    else:
        q, scale = ops.reference.quantize_activation(tokens, layer.act_bits, layer.act_clip)
        sums = lut_linear_group_sums_reference(q, weight).abs().double()
        magnitude = (sums * weight.scales.double()).sum(-1) * scale.double()[:, None] * weight.tensor_scale.double()
    if layer.bias is not None:
        magnitude = magnitude + layer.bias.detach().double().abs()
    return y, magnitude.view(y.shape)


def row_bound(layer):
    """docs/integrations/tensor_parallel.md: roundings of the sum on one rank, of the parts' sum and of the bias."""
    groups = -(-layer.in_features // layer.group_size // WORLD)
    inner = layer.group_size / 4 + 2 if layer.act_bits == 16 else 0
    return (groups + inner + WORLD + 2) * 2.0**-24


@pytest.mark.parametrize("name", ROW)
def test_row_parallel_is_within_the_contract(ranks, name):
    layer, x = make(ROW[name])
    expected, magnitude = row_reference(layer, x)
    bound = row_bound(layer) * magnitude
    if x.dtype != torch.float32:  # the last cast
        bound = bound + expected.abs() * (2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11)
    for found in ranks:
        first, second = found["row", name]
        assert first.dtype == x.dtype
        assert torch.equal(first, second)
        assert torch.equal(first, ranks[0]["row", name][0])
        assert bool(((first.double() - expected).abs() <= bound).all())


def test_autocast_gives_the_undivided_layers_dtype_and_bits(ranks):
    for style, case in ((RcpColwiseParallel, COLUMN["W2A4"]), (RcpRowwiseParallel, ROW["W2A4"])):
        layer, x = make(case)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            expected = layer(x)
        for found in ranks:
            y = found["autocast", style.__name__]
            assert y.dtype == expected.dtype == torch.bfloat16
            # The parts of a row-parallel layer are summed in another order before the one cast.
            torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=0 if style is RcpColwiseParallel else 1e-3)
            assert style is RcpRowwiseParallel or torch.equal(y, expected)


def test_a_scale_of_each_rank_by_itself_would_fail_the_bound():
    """Without a common scale of the ranks the result is outside of the bound."""
    layer, x = make(ROW["W2A4"])
    expected, magnitude = row_reference(layer, x)
    weight = layer.packed_weight()
    parts = [
        ops.reference.lut_linear(half, shard_columns(weight, rank, WORLD), None, layer.act_bits)
        for rank, half in enumerate(x.chunk(WORLD, -1))
    ]
    wrong = sum(parts) + layer.bias.detach().double()
    assert float(((wrong - expected).abs() / (row_bound(layer) * magnitude)).nan_to_num().max()) > 1000


def test_a_gated_mlp_of_both(ranks):
    with torch.inference_mode():
        expected = mlp().double()
    for found in ranks:
        assert torch.equal(found["mlp"], ranks[0]["mlp"])
        # One step of bfloat16, should the two sums fall on two sides of a rounding boundary.
        assert bool(
            ((found["mlp"].double() - expected).abs() <= 2.0**-7 * expected.abs() + 1e-5 * expected.abs().max()).all()
        )


def test_layouts(ranks):
    first = ranks[0]["row", "W2A4"][0]
    assert torch.equal(torch.cat([found["tokens scattered"] for found in ranks]), first)
    for found in ranks:
        is_dtensor, whole = found["dtensor"]
        assert is_dtensor
        assert torch.equal(whole, first)


def test_state_of_a_rank_is_a_packed_weight(ranks):
    layer, _ = make(ROW["W2A4"])
    for rank, found in enumerate(ranks):
        state = found["state"]
        assert torch.equal(state["bias"], layer.bias)
        weight = QuantLinear(128, 48, 2, 32, bias=False)
        weight.load_state_dict({key.removeprefix("shard."): value for key, value in state.items() if "shard." in key})
        expected = layer.dequantize()[:, rank * 96 : rank * 96 + 96]
        assert torch.equal(weight.dequantize(), nn.functional.pad(expected, (0, 32)))


def test_no_tokens(ranks):
    assert [found["no tokens"] for found in ranks] == [(0, 3, 48)] * WORLD


def test_nan_on_one_rank_is_an_error_on_all(ranks):
    for found in ranks:
        assert "ValueError: lut_linear: x must be finite" in found["nan"]


def test_gradients_are_those_of_one_process(ranks):
    for style, case in (("RcpColwiseParallel", COLUMN["W2A4"]), ("RcpRowwiseParallel", ROW["W2A4"])):
        layer, x = make(case)
        x.requires_grad_()
        layer(x).square().sum().backward()
        for rank, found in enumerate(ranks):
            grad_x, grad_bias = found["gradients", style]
            torch.testing.assert_close(grad_x, x.grad, rtol=1e-5, atol=1e-3)
            bias = layer.bias.grad if style == "RcpRowwiseParallel" else layer.bias.grad.chunk(WORLD)[rank]
            torch.testing.assert_close(grad_bias, bias, rtol=1e-5, atol=1e-3)


def test_an_input_of_another_width_or_dtype_is_refused(ranks):
    for found in ranks:
        for message in found["bad input"][:3]:
            assert message.startswith(
                "ValueError: RowParallelLinear: this rank's part of x must be float32, float16 or"
            )
            assert "with 96 features in its last dimension (in_features / ranks), got torch." in message
        for message in found["bad input"][3:6]:
            assert "must be in_features (192), got shape [2, " in message
        for message, width in zip(found["bad input"][6:], (64, 96, 128), strict=True):
            assert f"got torch.float32 (2, {width // 2}) with layout" in message


def test_errors_name_the_rule_and_leave_the_layer(ranks):
    for found in ranks:
        group, rotation, rows, kind, device, hooks, order = found["errors"]
        assert order.startswith("ValueError: RcpRowwiseParallel: the layer must have no input_order")
        assert "got an order of 96 inputs; divide its outputs with RcpColwiseParallel" in order
        assert group.startswith("ValueError: shard_columns: in_features must be a multiple of ranks * group_size")
        assert "got 160, 2 ranks and group_size 32; quantize this layer with a smaller group_size" in group
        assert (
            "each block of the rotation must lie within one rank, got 128 entries on 2 ranks and blocks of 128"
            in rotation
        )
        assert "out_features must be a multiple of the number of ranks, got 7 and 2 ranks" in rows
        assert kind.startswith("TypeError: RcpColwiseParallel: the module must be a QuantLinear, got Linear; quantize")
        assert "RcpRowwiseParallel: the layer must be on a device of the mesh, cpu, got meta" in device
        assert "the layer must have no hooks and no forward in the instance, which it would lose, got 1 hooks" in hooks
        assert found["untouched"]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group_size", "world"), [(32, 3), (64, 2), (128, 1)])
def test_slices_are_exact(bits, group_size, world):
    torch.manual_seed(0)
    weight = random_packed_weight(12, 2 * world * group_size, bits, group_size)
    whole = weight.dequantize()
    rows = [shard_rows(weight, rank, world).validate() for rank in range(world)]
    columns = [shard_columns(weight, rank, world).validate() for rank in range(world)]
    assert torch.equal(torch.cat([part.dequantize() for part in rows]), whole)
    assert torch.equal(torch.cat([part.dequantize() for part in columns], 1), whole)
    if world > 1:
        for part in (*rows, *columns):
            for name in ("codes", "levels", "scales"):
                tensor = getattr(part, name)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_slices_of_a_weight_without_tables_are_exact():
    torch.manual_seed(0)
    first = torch.randint(-127, 20, (16, 4, 1))
    levels = (first + torch.arange(4) * 32).to(torch.int8)
    codes, scales = torch.randint(0, 4, (16, 128), dtype=torch.uint8), torch.rand(16, 4).half()
    weight = PackedWeight.pack(codes, levels, scales, bits=2, group_size=32).as_uniform()
    for cut, dimension in ((shard_rows, 0), (shard_columns, 1)):
        parts = [cut(weight, rank, 2).validate() for rank in range(2)]
        assert [part.kind for part in parts] == ["uniform", "uniform"]
        assert torch.equal(torch.cat([part.dequantize() for part in parts], dimension), weight.dequantize())
