"""The CUDA kernels on a GPU, through torch, against the references. Without a GPU test_ptx_*.py executes them."""

import copy
import dataclasses
import io
import itertools
import pickle

import pytest
import torch

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, ops, quantize_activation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="skipped: no GPU")

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tails in rows and columns, one row, a column more than a unit of the layout, and a layer.
SHAPES = [(1, 32), (16, 128), (17, 100), (48, 513), (130, 1000), (256, 2048)]


def random_weight(rows, columns, bits, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-128, 128, (rows, groups, 2**bits), generator=generator).sort(-1).values.to(torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).half()
    return PackedWeight.pack(codes, levels, scales, 0.25, bits=bits, group_size=group_size)


def noise(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(x, weight, bias=None, act_bits=4, clip=1.0, **rotation):
    blob = ops.pack_weight(weight.to(DEVICE))
    bias = None if bias is None else bias.to(DEVICE)
    return ops.lut_linear(x.to(DEVICE), blob, bias, weight.geometry, act_bits, clip, **rotation)


def allowed(x, weight, bias, act_bits, clip):
    """The exact result and its bound: float32 sums (docs/numerics.md; lut_linear_a16.cuh for 16 bits) and the cast."""
    columns, group = weight.in_features, min(weight.group_size, 128)
    steps = -(-columns // group) + 2 * -(-columns // 512) + 3
    dense = weight.dequantize().double().abs()
    if act_bits == 16:
        magnitude = x.double().abs() @ dense.T
        peaks = torch.nn.functional.pad(x.double().abs(), (0, -columns % 512)).unflatten(-1, (-1, 512)).amax(-1)
        units = torch.nn.functional.pad(dense, (0, -columns % 512)).unflatten(-1, (-1, 512)).sum(-1)
        bound = (3 * steps + group / 8) * 2**-23 * magnitude + 2**-30 * (peaks @ units.T)
    else:
        q, scale = ops.reference.quantize_activation(x, act_bits, clip)
        bound = steps * 2**-24 * (q.double().abs() @ dense.T) * scale.double()[:, None]
    if bias is not None:
        bound = bound + 2**-24 * bias.double().abs()
    exact = ops.reference.lut_linear(x, weight, bias, act_bits, clip)
    half_step = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[x.dtype]
    smallest = {torch.float32: 2**-149, torch.float16: 2**-25, torch.bfloat16: 2**-134}[x.dtype]
    return exact, bound * (1 + half_step) + exact.abs() * half_step + smallest


def check(x, weight, bias=None, act_bits=4, clip=1.0):
    y = run(x, weight, bias, act_bits, clip)
    assert y.dtype == x.dtype
    exact, bound = allowed(x, weight, bias, act_bits, clip)
    error = (y.cpu().double() - exact).abs()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max()):.3g} of the bound"
    assert torch.equal(y, run(x, weight, bias, act_bits, clip))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "packed"), [(4, False), (4, True), (8, False)])
def test_quantize_activation_is_the_reference_bit_for_bit(dtype, bits, packed):
    for shape in [(1, 1), (3, 7), (5, 4096), (2, 3, 513), (0, 8), (4, 0)]:
        x = noise(*shape, dtype=dtype) * 3
        if x.numel():
            x.view(-1, shape[-1])[0] = 0
        for clip in (1.0, 0.9):
            q, scale = quantize_activation(x.to(DEVICE), bits, clip, packed)
            expected, expected_scale = ops.reference.quantize_activation(x, bits, clip, packed)
            assert torch.equal(q.cpu(), expected)
            assert torch.equal(scale.cpu(), expected_scale)
    strided = noise(6, 64, dtype=dtype)[::2, 1::2]
    for values in (strided, noise(65, dtype=dtype)[1:].view(1, 64)):  # not contiguous; not aligned
        q, _ = quantize_activation(
            values.to(DEVICE) if values is strided else noise(65, dtype=dtype).to(DEVICE)[1:], bits
        )
        assert torch.equal(q.cpu().view(-1), ops.reference.quantize_activation(values, bits)[0].reshape(-1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_pack_unpack_and_dequantize(bits, group_size):
    for rows, columns in SHAPES:
        weight = random_weight(rows, columns, bits, group_size or columns)
        blob = ops.pack_weight(weight.to(DEVICE))
        assert blob.numel() != ops.pack_weight(weight).numel()
        back = ops.unpack_weight(blob, weight.geometry)
        for name in PackedWeight.TENSORS:
            assert torch.equal(getattr(back, name).cpu(), getattr(weight, name)), name
        for dtype in DTYPES:
            dense = ops.dequantize(blob, weight.geometry, dtype)
            assert torch.equal(dense.cpu(), weight.dequantize().to(dtype))


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lut_linear(bits, act_bits, dtype):
    for rows, columns in SHAPES:
        # The kernel depends on the tokens and on the group size. Not every shape runs every pair of them.
        groups = itertools.cycle((32, 64, 128, columns) if rows % 2 else (128, columns, 32, 64, 64))
        for tokens in (1, 2, 5, 8, 9, 16, 17, 40):
            weight = random_weight(rows, columns, bits, next(groups))
            check(noise(tokens, columns, dtype=dtype), weight, act_bits=act_bits)


@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_bias_clip_and_leading_dimensions(act_bits):
    weight = random_weight(130, 1000, 2, 128)
    for dtype in DTYPES:
        for bias_dtype in DTYPES:
            check(noise(3, 1000, dtype=dtype), weight, noise(130, dtype=bias_dtype, seed=2), act_bits, clip=0.9)
    x = noise(2, 3, 1000, dtype=torch.float16)
    assert torch.equal(run(x, weight, act_bits=act_bits).view(6, 130), run(x.view(6, 1000), weight, act_bits=act_bits))
    strided = noise(4, 2000, dtype=torch.float16)[:, ::2]
    assert torch.equal(run(strided, weight, act_bits=act_bits), run(strided.contiguous(), weight, act_bits=act_bits))
    assert run(noise(0, 1000), weight, act_bits=act_bits).shape == (0, 130)


def test_misaligned_x():
    """A slice of a longer tensor may start at any element."""
    weight = random_weight(48, 512, 2, 128)
    for dtype in DTYPES:
        x = noise(2 * 512 + 1, dtype=dtype).to(DEVICE)[1:].view(2, 512)
        for act_bits in (4, 8, 16):
            assert torch.equal(run(x, weight, act_bits=act_bits), run(x.clone(), weight, act_bits=act_bits))


@pytest.mark.parametrize("order", ["sequency", "natural"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 96, 1536])
def test_input_rotation_is_walsh_transform_before_it(order, group):
    columns = 1536
    weight = random_weight(64, columns, 2, 128)
    layer = QuantLinear.from_packed(weight, input_rotation=OnlineRotation(columns, group_size=group, order=order)).to(
        DEVICE
    )
    for tokens in (1, 5, 20):
        for dtype in DTYPES:
            x = noise(tokens, columns, dtype=dtype).to(DEVICE)
            with torch.no_grad():
                y = layer(x)
            rotated = ops.walsh_transform(x, order=order, group_size=group)
            if tokens > 1 or group not in (32, 64, 128):
                assert torch.equal(y, run(rotated, weight))
                continue
            # One token with a rotation takes the kernel for several tokens, whose float32 sums have another order.
            # The integers are the same, so both results are within the bound of the rotated token's reference.
            exact, bound = allowed(rotated.cpu(), weight, None, 4, 1.0)
            assert bool(((y.cpu().double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_order_is_reordered_inputs(act_bits, dtype):
    weight = random_weight(48, 513, 3, 64)
    order = torch.randperm(513, generator=torch.Generator().manual_seed(0))
    for shape in ((513,), (1, 513), (2, 3, 513), (0, 513), (130, 513)):
        x = noise(*shape, dtype=dtype)
        y = run(x, weight, act_bits=act_bits, input_order=order.to(DEVICE))
        assert torch.equal(y, run(x[..., order], weight, act_bits=act_bits))
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(run(strided, weight, act_bits=act_bits, input_order=order.to(DEVICE)), y)
    layer = QuantLinear.from_packed(weight, None, act_bits, input_order=order).to(DEVICE)
    assert layer.input_order.is_cuda
    x = noise(5, 513).to(DEVICE).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(5, 513))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.cpu().to(DEVICE)):
        assert torch.equal(twin(x), layer(x))
    with pytest.raises(ValueError, match="input_order must be on cuda:0 like the other arguments, got the CPU"):
        run(x.detach(), weight, act_bits=act_bits, input_order=order)


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_with_nan_or_inf_is_nan_and_the_others_are_not(act_bits, bad):
    weight = random_weight(130, 1000, 2, 128)
    for tokens in (1, 6, 20):
        x = noise(tokens, 1000, dtype=torch.float16)
        clean = run(x, weight, act_bits=act_bits)
        x[tokens // 2, 999] = bad
        y = run(x, weight, act_bits=act_bits)
        if act_bits != 16:
            assert bool(y[tokens // 2].isnan().all())
        assert not bool(y[tokens // 2].isfinite().any())
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(y[others], clean[others])


def test_a_wrong_weight_is_refused_or_nan_but_never_misread():
    weight = random_weight(64, 512, 2, 128)
    x = noise(2, 512).to(DEVICE)
    blob = ops.pack_weight(weight.to(DEVICE))
    with pytest.raises(ValueError, match=r"lut_linear: weight must have \d+ bytes, .* which is packed for the CPU"):
        ops.lut_linear(x, ops.pack_weight(weight).to(DEVICE), None, weight.geometry, 4)
    with pytest.raises(ValueError, match="not packed for the CPU"):
        ops.lut_linear(x.cpu(), blob.cpu(), None, weight.geometry, 4)
    wrong = []
    for byte in (0, 8, 40):  # magic, shape hash, version
        wrong.append(blob.clone())
        wrong[-1][byte] += 1
    for rows, columns, group in ((63, 512, 128), (64, 500, 128), (32, 1024, 128), (64, 512, 512)):
        wrong.append(ops.pack_weight(random_weight(rows, columns, 2, group).to(DEVICE)))
    for case, other in enumerate(wrong):
        assert other.numel() == blob.numel()
        for act_bits in (4, 8, 16):
            for tokens in (1, 2, 20):
                y = ops.lut_linear(noise(tokens, 512).to(DEVICE), other, None, weight.geometry, act_bits)
                # The kernels compare the shape hash, which includes the version. unpack_weight compares both.
                assert bool(y.isnan().all()) or case == 2, (case, act_bits, tokens)
        assert bool(ops.dequantize(other, weight.geometry).isnan().all()) or case == 2
        with pytest.raises(ValueError, match=r"unpack_weight: .*(magic|hash|version|packed with)"):
            ops.unpack_weight(other, weight.geometry)
    with pytest.raises(ValueError, match="weight must have"):
        ops.lut_linear(x, blob[:-1], None, weight.geometry, 4)


def test_bad_arguments_read_as_on_the_cpu():
    weight = random_weight(64, 512, 2, 128)
    blobs = {"cpu": ops.pack_weight(weight), DEVICE: ops.pack_weight(weight.to(DEVICE))}

    def message(device, x, *arguments, bias=None):
        with pytest.raises(ValueError, match="lut_linear") as caught:
            ops.lut_linear(x.to(device), blobs[device], None if bias is None else bias.to(device), *arguments)
        return str(caught.value)

    for x, *arguments in (
        (noise(1, 511), (64, 512, 2, 128), 4),
        (noise(1, 512), (64, 512, 5, 128), 4),
        (noise(1, 512), (64, 512, 2, 48), 4),
        (noise(1, 512), (64, 512, 2, 128), 6),
        (noise(1, 512), (64, 512, 2, 128), 4, 1.5),
        (noise(1, 512).to(torch.int8), (64, 512, 2, 128), 4),
    ):
        assert message(DEVICE, x, *arguments) == message("cpu", x, *arguments)
    short = noise(63)
    arguments = (noise(1, 512), (64, 512, 2, 128), 4)
    assert message(DEVICE, *arguments, bias=short) == message("cpu", *arguments, bias=short)
    x, blob = noise(1, 512), blobs[DEVICE]
    with pytest.raises(ValueError, match=r"lut_linear: x must be on the GPU .* got the CPU"):
        ops.lut_linear(x, blob, None, *arguments[1:])
    with pytest.raises(ValueError, match=r"lut_linear: weight must be on cuda:0 like x, got the CPU; move the layer"):
        ops.lut_linear(x.to(DEVICE), blobs["cpu"], None, *arguments[1:])
    with pytest.raises(ValueError, match=r"bias must be on cuda:0 like the other arguments, got the CPU"):
        ops.lut_linear(x.to(DEVICE), blob, noise(64), *arguments[1:])


def test_uniform_groups_are_tables_on_the_device_and_uniform_again_in_files():
    table = random_weight(48, 200, 3, 64)
    uniform = dataclasses.replace(table, levels=table.levels[..., :1].clamp(max=15), kind="uniform").validate()
    blob = ops.pack_weight(uniform.to(DEVICE))
    assert torch.equal(blob, ops.pack_weight(uniform.as_table().to(DEVICE)))
    layer = QuantLinear.from_packed(uniform, act_bits=8).to(DEVICE)
    assert layer.kind == "uniform"
    for name, tensor in uniform.state_dict().items():
        assert torch.equal(layer.state_dict()[name].cpu(), tensor), name
    assert torch.equal(layer.cpu().packed, ops.pack_weight(uniform))


@pytest.mark.parametrize("act_bits", [4, 16])
def test_layer_moves_between_devices_in_the_canonical_format(act_bits):
    layer = QuantLinear.from_linear(torch.nn.Linear(200, 48), group_size=64, act_bits=act_bits)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = noise(3, 200)
    before = layer(x)
    moved = layer.to(DEVICE)
    assert moved is layer
    assert layer.packed.is_cuda
    y = layer(x.to(DEVICE))
    torch.testing.assert_close(y.cpu(), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.dequantize().cpu(), layer.packed_weight().to("cpu").dequantize())
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    on_cpu = torch.load(stored, map_location="cpu", weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x.to(DEVICE)), y)
    fresh = QuantLinear(200, 48, group_size=64, act_bits=act_bits, device=DEVICE)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x.to(DEVICE)), y)
    for name, tensor in layer.cpu().state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(layer(x), before)
    assert torch.equal(on_cpu(x), before)
    empty = QuantLinear(200, 48, group_size=64, act_bits=act_bits, device="meta").to_empty(device=DEVICE)
    empty.load_state_dict(state)
    assert torch.equal(empty(x.to(DEVICE)), y)


def test_gradients():
    layer = QuantLinear.from_linear(torch.nn.Linear(256, 48), act_bits=4).to(DEVICE)
    x = noise(5, 256).to(DEVICE).requires_grad_()
    layer(x).square().sum().backward()
    grad = 2 * layer(x.detach())
    torch.testing.assert_close(x.grad, grad @ layer.dequantize(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act_bits", [4, 16])
def test_cuda_graphs_and_streams(act_bits):
    """Split sums count arrivals in memory that launches of different streams and graphs must not share."""
    weights = [random_weight(256, 2048, 2, 128, seed=seed) for seed in range(4)]
    blobs = [ops.pack_weight(weight.to(DEVICE)) for weight in weights]

    def forward(x):
        return [ops.lut_linear(x, blob, None, weights[0].geometry, act_bits) for blob in blobs]

    for tokens in (1, 8):
        x = noise(tokens, 2048, dtype=torch.float16).to(DEVICE)
        expected = forward(x)
        graphs = []
        for _ in range(2):
            own = x.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = forward(own)
            graphs.append((graph, own, outputs))
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for _ in range(20):
            for _, _, outputs in graphs:
                for output in outputs:
                    output.fill_(float("nan"))
            torch.cuda.synchronize()
            for stream, (graph, _, _) in zip(streams, graphs, strict=False):
                with torch.cuda.stream(stream):
                    graph.replay()
            with torch.cuda.stream(streams[2]):
                eager = forward(x)
            torch.cuda.synchronize()
            for outputs in (eager, *(outputs for _, _, outputs in graphs)):
                assert all(map(torch.equal, outputs, expected))


def test_compiled_layer():
    layer = QuantLinear.from_linear(torch.nn.Linear(256, 48)).to(DEVICE)
    x = noise(5, 256).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="skipped: one GPU")
def test_the_device_of_x_is_used_whatever_the_current_one():
    layer = QuantLinear.from_linear(torch.nn.Linear(256, 48)).to("cuda:1")
    x = noise(5, 256)
    assert layer(x.to("cuda:1")).device.index == 1
    with pytest.raises(ValueError, match=r"weight must be on cuda:0 like x, got cuda:1"):
        layer(x.to("cuda:0"))
