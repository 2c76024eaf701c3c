"""The packed weight: bit stream, round trips, dequantization, every rule of validate()."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_numpy_file
from safetensors.torch import load_file, save_file

from rcp_kernels import PackedWeight
from rcp_kernels.formats import num_groups, pack_codes, row_bytes, snap_levels, uniform_step, unpack_codes


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int, seed: int = 0, tensor_scale: float = 2.0**-9
) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight of random codes, tables and scales, and its codes one a byte."""
    generator = torch.Generator().manual_seed(seed)
    groups = num_groups(in_features, group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, generator=generator)
    levels = torch.randint(-127, 128, (out_features, groups, 2**bits), generator=generator)
    levels = levels.sort(dim=-1).values.to(torch.int8)
    scales = (torch.rand((out_features, groups), generator=generator) + 0.1).to(torch.float16)
    return PackedWeight.pack(codes, levels, scales, tensor_scale, bits=bits, group_size=group_size), codes


def uniform_weight(
    out_features: int, in_features: int, bits: int, group_size: int, seed: int = 0
) -> tuple[PackedWeight, torch.Tensor]:
    """As random_weight, of kind uniform: first levels over their whole range, and a scale of 0."""
    weight, codes = random_weight(out_features, in_features, bits, group_size, seed)
    first = torch.randint(
        -128, uniform_step(bits), (*weight.scales.shape, 1), generator=torch.Generator().manual_seed(seed)
    )
    first.view(-1)[:2] = torch.tensor([-128, uniform_step(bits) - 1])[: first.numel()]
    return dataclasses.replace(weight, levels=first.to(torch.int8), kind="uniform").validate(), codes


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, int, int]:
    out_features = draw(st.integers(1, 5))
    in_features = draw(st.one_of(st.integers(1, 40), st.integers(41, 300)))
    return (
        out_features,
        in_features,
        draw(st.sampled_from((2, 3, 4))),
        draw(st.sampled_from((32, 64, 128, in_features))),
    )


@pytest.mark.parametrize(
    ("bits", "codes", "stream"),
    [
        # The worked examples of docs/format.md.
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0xE4, 0x1B]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0x88, 0xC6, 0xFA]),
        (4, [0, 1, 2, 3, 12, 13, 14, 15], [0x10, 0x32, 0xDC, 0xFE]),
        (3, [7, 0, 5, 1, 6], [0x47, 0x63]),
    ],
)
def test_stream_of_worked_example(bits: int, codes: list[int], stream: list[int]) -> None:
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits, len(codes))
    assert packed.tolist() == [stream]


@given(geometry=geometries(), seed=st.integers(0, 2**31))
@example(geometry=(1, 1, 3, 1), seed=0)
@example(geometry=(2, 5, 3, 128), seed=0)
def test_codes_round_trip_and_follow_the_bit_rule(geometry: tuple[int, int, int, int], seed: int) -> None:
    out_features, in_features, bits, group_size = geometry
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits, group_size)
    padded = num_groups(in_features, group_size) * group_size
    assert packed.shape == (out_features, -(-padded * bits // 8))
    assert row_bytes(in_features, bits, group_size) == packed.shape[1]
    assert torch.equal(unpack_codes(packed, in_features, bits, group_size), codes)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert int.from_bytes(bytes(stream), "little") == number


@given(geometry=geometries(), seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_dequantize_is_the_formula(geometry: tuple[int, int, int, int], seed: int, exponent: int) -> None:
    out_features, in_features, _, group_size = geometry
    weight, codes = random_weight(*geometry, seed=seed, tensor_scale=2.0**exponent)
    value = weight.dequantize()
    assert value.dtype == torch.float32
    for n in range(out_features):
        for k in range(in_features):
            g = k // group_size
            level = int(weight.levels[n, g, int(codes[n, k])])
            # Exact, as the format promises: Python's float has room for every bit.
            assert float(value[n, k]) == 2.0**exponent * float(weight.scales[n, g]) * level
    assert torch.equal(weight.unpack(), codes)


def test_chunked_rows_equal_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codes = random_weight(37, 200, 3, 64)
    dense = weight.dequantize()
    monkeypatch.setattr("rcp_kernels.formats.codes._CHUNK_WEIGHTS", 1000)
    assert torch.equal(pack_codes(codes, 3, 64), weight.codes)
    assert torch.equal(weight.unpack(), codes)
    assert torch.equal(weight.dequantize(), dense)


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.375), (3, 3.625), (4, 5.125)])
def test_bits_per_weight_at_group_128(bits: int, expected: float) -> None:
    weight, _ = random_weight(1024, 1024, bits, 128)
    # tensor_scale is the rest: 32 bits a tensor.
    assert weight.bits_per_weight == pytest.approx(expected + 32 / 1024**2, abs=0)
    assert weight.nbytes == sum(getattr(weight, name).nbytes for name in PackedWeight.TENSORS)


def test_state_dict_round_trip(tmp_path) -> None:
    weight, codes = random_weight(6, 150, 3, 64)
    tensors = weight.state_dict("layer.")
    assert sorted(tensors) == [f"layer.{name}" for name in ("codes", "format", "levels", "scales", "tensor_scale")]
    assert tensors["layer.format"].tolist() == [1, 3, 64, 150, 6]
    assert tensors["layer.format"].dtype == torch.int64
    save_file(tensors, tmp_path / "weight.safetensors")
    loaded = PackedWeight.from_state_dict(load_file(tmp_path / "weight.safetensors"), "layer.")
    for name in PackedWeight.TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(weight, name))
    assert torch.equal(loaded.unpack(), codes)
    assert (loaded.version, loaded.bits, loaded.group_size, loaded.in_features, loaded.out_features) == (
        1,
        3,
        64,
        150,
        6,
    )


def rejects(message: str, *words: str):
    """Expect a ValueError that names the rule, the value found and the remedy."""
    return pytest.raises(ValueError, match=".*".join((message, *words)))


def test_validate_names_rule_value_and_remedy() -> None:
    weight, _ = random_weight(4, 96, 2, 32)
    good = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}

    def check(**changes: object) -> None:
        PackedWeight(**{**good, **changes}).validate()

    check()
    with rejects("kind must be one of", "got 'affine'", "use 'table'"):
        check(kind="affine")
    with rejects("in_features must be an int", "got 96.0", "convert"):
        check(in_features=96.0)
    with rejects("out_features must be an int", "got True"):
        check(out_features=True)
    with rejects("bits must be one of", "got 5", "choose"):
        check(bits=5)
    with rejects("bits must be one of", "got True"):
        check(bits=True)
    with rejects("group_size must be one of", r"in_features \(96\)", "got 48", "pass in_features"):
        check(group_size=48)
    with rejects("in_features must be an int of at least 1", "got 0", "convert"):
        check(in_features=0)
    with rejects("group_size must be at most 131071", "got 131072", "use 128"):
        check(group_size=2**17, in_features=2**17)
    with rejects("codes must be torch.uint8", "got torch.int8", "unconverted"):
        check(codes=weight.codes.view(torch.int8))
    with rejects("codes must have shape", r"\(4, 24\)", r"got \(4, 23\)", "truncated"):
        check(codes=weight.codes[:, :23])
    with rejects("codes must have shape", r"got \(3, 24\)", "truncated"):
        check(codes=weight.codes[:3])
    with rejects("levels must have shape", r"\(4, 3, 4\)", r"got \(4, 3, 8\)"):
        check(levels=torch.zeros((4, 3, 8), dtype=torch.int8))
    with rejects("levels must be torch.int8", "got torch.float16"):
        check(levels=weight.levels.half())
    with rejects("levels must be ascending", r"row, group \[0, 0\]", "sort the levels"):
        check(levels=weight.levels.flip(-1))
    with rejects("scales must be torch.float16", "got torch.float32", "unconverted"):
        check(scales=weight.scales.float())
    for bad in (float("nan"), float("inf"), -1.0):
        scales = weight.scales.clone()
        scales[2, 1] = bad
        with rejects("scales must be finite and >= 0", f"got {bad}", r"\[2, 1\]", "tensor_scale"):
            check(scales=scales)
    for bad in (0.0, -1.0, 3.0, float("nan"), float("inf")):
        with rejects("tensor_scale must be a finite positive power of two", f"got {bad}", "round it"):
            check(tensor_scale=torch.tensor(bad))
    with rejects("tensor_scale must be torch.float32", "got float"):
        check(tensor_scale=1.0)
    with rejects(r"on the device of codes \(cpu\)", "got levels on meta", "move them together"):
        check(levels=weight.levels.to("meta"))
    # The meta device has no values to look at.
    check(**{name: getattr(weight, name).to("meta") for name in PackedWeight.TENSORS})


def test_equal_neighbouring_levels_are_allowed() -> None:
    weight, _ = random_weight(2, 32, 2, 32)
    dataclasses.replace(weight, levels=torch.zeros_like(weight.levels)).validate()


def test_from_state_dict_refuses_damage() -> None:
    weight, _ = random_weight(4, 96, 2, 32)
    good = weight.state_dict()
    for name in good:
        with rejects("five tensors", f"missing {name}", "incomplete"):
            PackedWeight.from_state_dict({key: value for key, value in good.items() if key != name})
    # A later version may have more fields: it must be refused for its version.
    for future in ([4, 2, 32, 96, 4], [7, 1, 2, 3, 4, 5, 6, 7]):
        with rejects("version must be 1 to 3", f"got {future[0]}", "newer rcp-kernels"):
            PackedWeight.from_state_dict({**good, "format": torch.tensor(future)})
    for header, words in (
        ([0, 2, 32, 96, 4], ("version must be 1 to 3", "got 0", "damaged")),
        ([1, 2, 32], ("version 1 has 5 entries", "got 3", "damaged")),
        ([1, 2, 32, 96, 4, 1], ("version 1 has 5 entries", "got 6", "damaged")),
        ([2, 2, 32, 96, 4], ("version 2 has 6 entries", "got 5", "damaged")),
        ([3, 2, 32, 96, 4], ("version 3 has 6 entries", "got 5", "damaged")),
        ([3, 2, 32, 96, 4, 2], ("kind in format of version 3", r"0 \(table\), 1 \(uniform\)", "got 2", "damaged")),
        ([3, 2, 32, 96, 4, 0], ("version 3 must have an input_order", "got none", "incomplete")),
        ([2, 2, 32, 96, 4, 2], ("kind in format of version 2", r"0 \(table\), 1 \(uniform\)", "got 2", "damaged")),
        ([2, 2, 32, 96, 4, -1], ("kind in format of version 2", "got -1", "damaged")),
        ([2, 2, 32, 96, 4, 1], ("levels must have shape", r"\(4, 3, 1\)", "kind='uniform'", r"got \(4, 3, 4\)")),
    ):
        with rejects(*words):
            PackedWeight.from_state_dict({**good, "format": torch.tensor(header)})
    # Tables may be said to be tables.
    explicit = PackedWeight.from_state_dict({**good, "format": torch.tensor([2, 2, 32, 96, 4, 0])})
    assert (explicit.kind, explicit.version) == ("table", 1)
    with rejects("format must be int64", "got torch.float32", "unconverted"):
        PackedWeight.from_state_dict({**good, "format": good["format"].float()})
    for bad, found in ((None, "NoneType"), ([1, 2, 32, 96, 4], "list"), (good["format"].to("meta"), "meta device")):
        with rejects("format must be int64", f"got .*{found}", "; "):
            PackedWeight.from_state_dict({**good, "format": bad})
    with rejects("codes must have shape", "truncated"):
        PackedWeight.from_state_dict({**good, "codes": good["codes"][:, :-1]})


def test_pack_codes_refuses_bad_input() -> None:
    codes = torch.zeros((2, 64), dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"codes must be uint8.*got torch.int64.*convert"):
        pack_codes(codes.long(), 2, 32)
    with rejects("codes must be", r"got shape \(64,\)", "reshape"):
        pack_codes(codes[0], 2, 32)
    with rejects("codes of 2 bits must be below 4", "got 4", "more bits"):
        pack_codes(codes + 4, 2, 32)
    with pytest.raises(TypeError, match=r"packed codes must be uint8.*got torch.int8"):
        unpack_codes(torch.zeros((2, 16), dtype=torch.int8), 64, 2, 32)
    with rejects("take 16 bytes a row", r"got shape \(2, 15\)", "truncated"):
        unpack_codes(torch.zeros((2, 15), dtype=torch.uint8), 64, 2, 32)


@given(
    bits=st.sampled_from((2, 3, 4)),
    exponent=st.integers(-60, 60),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_snapped_levels_are_close(bits: int, exponent: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponent = max(-12, min(8, exponent)) if dtype == torch.float16 else exponent
    levels = (torch.randn((3, 4, 2**bits), generator=generator) * 2.0**exponent).to(dtype).sort(dim=-1).values
    snapped, scales, tensor_scale = snap_levels(levels)
    assert 128 <= float(scales.max()) <= 256
    value = snapped.double() * scales.double()[..., None] * tensor_scale.double()
    largest = levels.double().abs().amax(-1, keepdim=True)
    # Half a step of 1/127, and float16's rounding of the scale.
    assert bool(((value - levels.double()).abs() <= largest * (1 / 254 + 2.0**-11 + 1e-6)).all())


def test_from_float_levels() -> None:
    _, codes = random_weight(4, 96, 2, 32)
    levels = torch.tensor([-1.0, -0.25, 0.25, 1.0], dtype=torch.float16).expand(4, 3, 4) * 0.03
    weight = PackedWeight.from_float_levels(codes, levels, bits=2, group_size=32)
    expected = levels.float().gather(2, codes.long().view(4, 3, 32)).view(4, 96)
    assert torch.allclose(weight.dequantize(), expected, rtol=0, atol=0.03 / 250)
    with pytest.raises(TypeError, match=r"levels must be floating point.*got torch.int8.*float"):
        PackedWeight.from_float_levels(codes, levels.to(torch.int8), bits=2, group_size=32)
    with rejects("levels must be ascending", "sort the levels"):
        PackedWeight.from_float_levels(codes, levels.flip(-1), bits=2, group_size=32)
    with rejects("levels must be finite", r"got nan at row, group, level \[0, 0, 0\]", "check"):
        PackedWeight.from_float_levels(codes, levels * float("nan"), bits=2, group_size=32)
    with rejects("levels must have shape", r"got \(4, 2, 4\)"):
        PackedWeight.from_float_levels(codes, levels[:, :2], bits=2, group_size=32)


def test_writer_of_the_documentation(tmp_path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    namespace: dict[str, object] = {}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    for kind, bits, in_features, group_size in itertools.product(
        ("table", "uniform"), (2, 3, 4), (5, 150), (32, 64, None)
    ):
        make = random_weight if kind == "table" else uniform_weight
        weight, codes = make(3, in_features, bits, group_size or in_features)
        group_size = weight.group_size
        tensors = namespace["packed_weight"](
            codes.numpy(), weight.levels.numpy(), weight.scales.numpy(), float(weight.tensor_scale), bits, group_size
        )
        save_numpy_file({f"layer.{key}": value for key, value in tensors.items()}, tmp_path / "weight.safetensors")
        loaded = PackedWeight.from_state_dict(load_file(tmp_path / "weight.safetensors"), "layer.")
        assert loaded.kind == kind
        for name in PackedWeight.TENSORS:
            assert torch.equal(getattr(loaded, name), getattr(weight, name))


def test_padding_example_of_the_documentation() -> None:
    codes = torch.tensor([[3, 2, 1, 0, 3]], dtype=torch.uint8)
    assert bytes(pack_codes(codes, 2, 32)[0].tolist()) == bytes.fromhex("1B 03 00 00 00 00 00 00")


def test_snapping_example_of_the_documentation() -> None:
    levels, scales, tensor_scale = snap_levels(torch.tensor([[[-3.0, -1.0, 1.0, 3.0]]]) / 8)
    assert levels.tolist() == [[[-127, -42, 42, 127]]]
    assert (scales.tolist(), float(tensor_scale)) == ([[193.5]], 2.0**-16)
    assert round(2.0**-16 * 193.5 * 127, 6) == 0.374977


@given(geometry=geometries(), seed=st.integers(0, 2**31))
def test_uniform_groups_are_tables_in_progression(geometry: tuple[int, int, int, int], seed: int) -> None:
    uniform, codes = uniform_weight(*geometry, seed=seed)
    bits, step = geometry[2], {2: 32, 3: 16, 4: 8}[geometry[2]]
    table = uniform.as_table().validate()
    assert (table.kind, table.levels.shape[-1]) == ("table", 2**bits)
    for n, g in itertools.product(range(table.levels.shape[0]), range(table.levels.shape[1])):
        first = int(uniform.levels[n, g, 0])
        assert table.levels[n, g].tolist() == [first + step * i for i in range(2**bits)]
    assert torch.equal(table.dequantize(), uniform.dequantize())
    assert torch.equal(uniform.unpack(), codes)
    back = table.as_uniform()
    assert all(torch.equal(getattr(back, name), getattr(uniform, name)) for name in PackedWeight.TENSORS)
    assert uniform.as_uniform() is uniform
    assert table.as_table() is table


def test_a_group_of_scale_zero_is_uniform_whatever_its_levels() -> None:
    weight = uniform_weight(2, 96, 3, 32)[0].as_table()
    levels, scales = weight.levels.clone(), weight.scales.clone()
    levels[1, 2], scales[1, 2] = torch.tensor([-9, -9, -9, 0, 0, 1, 7, 7]), 0
    weight = dataclasses.replace(weight, levels=levels, scales=scales)
    uniform = weight.as_uniform().validate()
    assert int(uniform.levels[1, 2, 0]) == 0
    assert torch.equal(uniform.dequantize(), weight.dequantize())


def test_what_is_not_uniform_is_refused() -> None:
    weight = uniform_weight(2, 96, 3, 32)[0].as_table()
    for level in range(8):
        levels = weight.levels.clone()
        levels[1, 2, level] += 1 if int(levels[1, 2, level]) < 127 else -1
        with rejects("levels of a uniform group at 3 bits must rise by 16", r"row, group \[1, 2\]", "kind 'table'"):
            dataclasses.replace(weight, levels=levels).as_uniform()
    # From 112 to -128: in int8 that difference would be 16.
    wrapped = (torch.arange(8) * 16 + 32).to(torch.int8).expand_as(weight.levels)
    with rejects("must rise by 16"):
        dataclasses.replace(weight, levels=wrapped).as_uniform()
    with rejects("must have values to be found uniform", "meta device", "load"):
        weight.to("meta").as_uniform()
    for bits, most in ((2, 31), (3, 15), (4, 7)):
        uniform, _ = uniform_weight(2, 96, bits, 32)
        levels = uniform.levels.clone()
        levels[0, 2] = most + 1
        with rejects(f"at {bits} bits must be at most {most}", f"got {most + 1} in row, group \\[0, 2\\]", "table"):
            dataclasses.replace(uniform, levels=levels).validate()
    uniform.to("meta").validate()
    assert uniform.to("meta").as_table().levels.shape == (2, 3, 16)


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.1875), (3, 3.1875), (4, 4.1875)])
def test_uniform_groups_cost_one_level(tmp_path, bits: int, expected: float) -> None:
    weight, _ = uniform_weight(1024, 1024, bits, 128)
    assert weight.bits_per_weight == pytest.approx(expected + 32 / 1024**2, abs=0)
    tensors = weight.state_dict("layer.")
    assert tensors["layer.format"].tolist() == [2, bits, 128, 1024, 1024, 1]
    save_file(tensors, tmp_path / "weight.safetensors")
    loaded = PackedWeight.from_state_dict(load_file(tmp_path / "weight.safetensors"), "layer.")
    assert (loaded.kind, loaded.version) == ("uniform", 2)
    assert all(torch.equal(getattr(loaded, name), getattr(weight, name)) for name in PackedWeight.TENSORS)
