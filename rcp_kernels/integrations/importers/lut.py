"""Formats with a table of real levels for each row: SqueezeLLM and any-precision, and any other by its codes.

Their levels are any float16 or float32 numbers. In general int8 levels times a scale cannot hold them. With the default
``exact=True`` such a table is refused. With ``exact=False`` a level moves by at most 1/254 + 2**-11 of the largest
level of its row, and the weight comes with the measured error. The group is the row (group_size = K).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...formats import ImportedWeight, check_bits
from ...ops.checks import FLOAT_DTYPES
from .inputs import as_tensor, check_bias, take, unpack_words
from .tables import pack_levels

__all__ = ["import_any_precision", "import_lut", "import_squeezellm"]

_WARP_BYTES = 128  # 32 threads of 4 bytes


def import_lut(
    codes: Tensor | np.ndarray,
    tables: Tensor | np.ndarray,
    *,
    bits: int,
    exact: bool = True,
    bias: Tensor | np.ndarray | None = None,
) -> ImportedWeight:
    """Pack codes of one byte each and a table for each row: ``weight[n, k] = tables[n, codes[n, k]]``.

    Args:
        codes: uint8 [N, K], each below 2**bits.
        tables: floating point [N, 2**bits], in any order.
        bits: 2, 3 or 4.
        exact: refuse tables that int8 levels times a float16 scale cannot hold; False rounds them.
        bias: floating point [N], or None.

    Raises:
        ValueError: wrong dtypes or shapes; a code out of range; levels that are not finite or, if exact, not held.
    """
    where = "import_lut"
    codes, tables = as_tensor(where, "codes", codes), as_tensor(where, "tables", tables)
    return _import_rows(where, codes, tables, bits, exact, bias)


def import_squeezellm(
    tensors: Mapping[str, Tensor | np.ndarray], prefix: str = "", *, bits: int, exact: bool = True
) -> ImportedWeight:
    """Read the dense part of one SqueezeLLM layer.

    Args:
        tensors: ``qweight`` int32 [K*bits/32, N], a stream along K as GPTQ's, ``lookup_table`` [N, 2**bits] and,
            optional, ``bias`` [N], each under ``prefix``; tensors or numpy arrays.
        prefix: of the layer.
        bits: 2, 3 or 4.
        exact: as :func:`import_lut`.

    Raises:
        ValueError: as :func:`import_lut`; or the layer has a sparse part (``vals``, ``full_rows``), which a packed
            weight cannot hold.
    """
    where = f"import_squeezellm: {prefix}" if prefix else "import_squeezellm"
    check_bits(bits)
    sparse = [name for name in ("vals", "full_rows") if prefix + name in tensors]
    if sparse:
        raise ValueError(
            f"{where}: a layer must be dense, got outliers in {', '.join(sparse)}; remove those keys and add their "
            f"product to the layer's output yourself"
        )
    qweight = take(where, tensors, prefix + "qweight", (torch.int32,), 2)
    tables = take(where, tensors, prefix + "lookup_table", FLOAT_DTYPES, 2)
    codes = unpack_words(qweight.t(), bits, qweight.shape[0] * 32 // bits)
    return _import_rows(where, codes, tables, bits, exact, tensors.get(prefix + "bias"))


def import_any_precision(
    tensors: Mapping[str, Tensor | np.ndarray], prefix: str = "", *, bits: int, exact: bool = True
) -> ImportedWeight:
    """Read one any-precision layer (Park et al. 2024, arXiv 2402.10517) at one of its widths.

    ``qweight`` holds a plane for each bit, the highest first. The bytes of a plane are in the order in which a warp of
    the library's kernel loads them. The first ``bits`` planes are the codes of ``lut{bits}``.

    Args:
        tensors: ``qweight`` int32 [at least bits, N, K/32], ``lut{bits}`` [N, 2**bits] and, optional, ``bias`` [N],
            each under ``prefix``; tensors or numpy arrays.
        prefix: of the layer.
        bits: 2, 3 or 4.
        exact: as :func:`import_lut`.

    Raises:
        ValueError: as :func:`import_lut`, or fewer than ``bits`` planes.
    """
    where = f"import_any_precision: {prefix}" if prefix else "import_any_precision"
    check_bits(bits)
    planes = take(where, tensors, prefix + "qweight", (torch.int32,), 3)
    tables = take(where, tensors, f"{prefix}lut{bits}", FLOAT_DTYPES, 2)
    if planes.shape[0] < bits:
        raise ValueError(
            f"{where}: qweight must have a plane for each of {bits} bits, got {planes.shape[0]}; choose fewer bits"
        )
    shifts = torch.arange(0, 32, 8, device=planes.device)
    planes_bytes = ((planes[:bits, :, :, None] >> shifts) & 0xFF).flatten(2)
    planes_bytes = planes_bytes[:, :, _byte_places(planes_bytes.shape[2]).to(planes.device)]
    high_first = torch.arange(7, -1, -1, device=planes.device)
    bit = ((planes_bytes[..., None] >> high_first) & 1).flatten(2)
    codes = torch.zeros(bit.shape[1:], dtype=torch.uint8, device=planes.device)
    for plane in bit:
        codes = codes * 2 + plane.to(torch.uint8)
    return _import_rows(where, codes, tables, bits, exact, tensors.get(prefix + "bias"))


def _byte_places(count: int) -> Tensor:
    """The place of each byte b of a row's plane: thread b % 32 of a warp stores its four bytes in reverse order.

    A last warp that is not full has as many threads as words.
    """
    byte = torch.arange(count)
    full = count // _WARP_BYTES * _WARP_BYTES
    start = byte // _WARP_BYTES * _WARP_BYTES
    threads = torch.where(byte < full, 32, max(1, (count - full) // 4))
    within = byte - start
    return start + within % threads * 4 + (3 - within // threads)


def _import_rows(
    where: str, codes: Tensor, tables: Tensor, bits: int, exact: bool, bias: Tensor | np.ndarray | None
) -> ImportedWeight:
    check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(
            f"{where}: codes must be uint8 [N, K], both at least 1, got {codes.dtype} of shape {tuple(codes.shape)}; "
            f"unpack them to one a byte"
        )
    if not tables.is_floating_point() or tuple(tables.shape) != (codes.shape[0], 2**bits):
        raise ValueError(
            f"{where}: tables must be floating point of shape {(codes.shape[0], 2**bits)}, got {tables.dtype} of shape "
            f"{tuple(tables.shape)}; one table of 2**bits levels for each row"
        )
    if int(codes.max()) >= 2**bits:
        raise ValueError(f"{where}: codes must be below {2**bits}, got {int(codes.max())}; check bits")
    offset = check_bias(where, bias, len(codes))
    return pack_levels(where, codes, tables[:, None], bits=bits, group_size=codes.shape[1], exact=exact, bias=offset)
