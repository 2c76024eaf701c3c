"""Tables a row: SqueezeLLM's and any-precision's layouts, written here anew (neither is on the package index)."""

import numpy as np
import pytest
import torch
from test_importers_gptq import stream

from rcp_kernels.integrations.importers import import_any_precision, import_lut, import_squeezellm


def reference(codes, tables):
    return np.take_along_axis(tables.astype(np.float64), codes, axis=1)


def tables_of(kind, rows, bits, rng):
    if kind == "integers":  # times a float16 scale, in no order: held exactly
        levels = np.stack([rng.permutation(np.arange(-127, 128))[: 2**bits] for _ in range(rows)])
        return (levels * rng.uniform(1e-4, 1e-2, (rows, 1)).astype(np.float16)).astype(np.float64)
    return rng.standard_normal((rows, 2**bits)).astype(np.float16).astype(np.float64)


def any_precision(codes, planes):
    """The library's layout, from its description: bytes of a plane dealt to the 32 threads of a warp in turn, four
    rounds, and each thread's four bytes read as one little-endian word with the first byte highest."""
    rows, columns = codes.shape
    out = np.zeros((planes, rows, columns // 32), np.uint32)
    for plane in range(planes):
        for row in range(rows):
            bits = (codes[row] >> (planes - 1 - plane)) & 1
            row_bytes = np.packbits(bits.astype(np.uint8))
            word = 0
            while len(row_bytes):
                threads = min(32, len(row_bytes) // 4)
                rounds, row_bytes = row_bytes[: 4 * threads].reshape(4, threads), row_bytes[4 * threads :]
                for thread in range(threads):
                    out[plane, row, word + thread] = int.from_bytes(bytes(rounds[:, thread].tolist()), "big")
                word += threads
    return torch.from_numpy(out.view(np.int32))


@pytest.mark.parametrize("kind", ["integers", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 96), (3, 1024 + 160)])
def test_squeezellm_and_any_precision(kind, bits, rows, columns):
    rng = np.random.default_rng(bits * columns)
    codes, tables = rng.integers(0, 2**bits, (rows, columns)), tables_of(kind, rows, bits, rng)
    values = torch.from_numpy(reference(codes, tables))
    squeeze = {"l.qweight": stream(codes.T, bits), "l.lookup_table": torch.from_numpy(tables).float()}
    # Planes of 4 bits, the codes above in the highest ones: the low ones are another width's.
    full = codes << (4 - bits) | rng.integers(0, 2 ** (4 - bits), codes.shape)
    planes = {"l.qweight": any_precision(full, 4), f"l.lut{bits}": torch.from_numpy(tables).half()}
    readers = [(import_squeezellm, squeeze)]
    if kind == "real":  # its tables are float16
        readers.append((import_any_precision, planes))
    for read, tensors in readers:
        if kind == "integers":
            imported = read(tensors, "l.", bits=bits)
            assert imported.error == 0.0
            assert torch.equal(imported.dequantize().double(), values)
            continue
        with pytest.raises(ValueError, match="pass exact=False to round"):
            read(tensors, "l.", bits=bits)
        imported = read(tensors, "l.", bits=bits, exact=False)
        largest = torch.from_numpy(np.abs(tables).max(axis=1, keepdims=True))
        worst = float(((imported.dequantize() - values).abs() / largest).max())
        assert 0 < worst <= imported.error <= 1 / 254 + 2**-11
        assert imported.weight.group_size == columns


def test_tables_at_the_edge_of_the_format():
    codes = torch.arange(16, dtype=torch.uint8).repeat(6, 1)
    table = torch.zeros((6, 16), dtype=torch.float64)
    table[1] = torch.arange(15, -1, -1)  # descending
    table[2] = torch.arange(16) * 127.0 / 15  # no common unit: rounded below
    table[2] = table[2].round()
    table[3] = 2.0**-20 * torch.arange(-8, 8)
    table[4, 3] = -2047 * 2.0**-10  # a single level, 11 bits
    table[5, 0], table[5, 1] = 4095.0, 1365.0  # 4095 has 12 bits, 3 * 1365 has not
    imported = import_lut(codes, table, bits=4)
    assert imported.error == 0.0
    assert torch.equal(imported.dequantize().double(), table)
    table[4, 3] = 2049.0 * 2**-10 * 129  # a prime factor of 683 and 2049 * 43: 17 bits however it is divided
    with pytest.raises(ValueError, match=r"row, group \(4, 0\)"):
        import_lut(codes, table, bits=4)
    assert import_lut(codes, table, bits=4, exact=False).error < 2**-11
    codes[4] = 0  # no weight has that level any more
    imported = import_lut(codes, table, bits=4)
    assert torch.equal(imported.dequantize().double(), table.gather(1, codes.long()))


def test_what_is_no_table_of_a_row_is_refused():
    codes, tables = torch.zeros((2, 32), dtype=torch.uint8), torch.zeros((2, 8))
    for arguments, message in (
        ((codes.long(), tables), "codes must be uint8"),
        ((codes, tables[:1]), "tables must be floating point of shape"),
        ((codes + 8, tables), "codes must be below 8, got 8"),
        ((codes, tables * torch.nan), "levels must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            import_lut(*arguments, bits=3)
    sparse = {"qweight": torch.zeros((3, 2), dtype=torch.int32), "lookup_table": tables, "vals": torch.zeros(1)}
    with pytest.raises(ValueError, match="a layer must be dense, got outliers in vals"):
        import_squeezellm(sparse, bits=3)
    planes = {"qweight": torch.zeros((2, 2, 1), dtype=torch.int32), "lut3": tables.half()}
    with pytest.raises(ValueError, match="a plane for each of 3 bits, got 2"):
        import_any_precision(planes, bits=3)
