"""Write the .npz files beside this script: layers packed by AutoGPTQ's and AutoAWQ's own code.

Neither library runs under current releases of its dependencies, so their packing modules are loaded by themselves:

    pip download --no-deps auto-gptq==0.7.1 && unzip auto_gptq-0.7.1-*.whl -d auto_gptq      # needs CPython 3.8 to 3.11
    pip download --no-deps --no-binary :all: --no-build-isolation autoawq==0.2.9 && tar xzf autoawq-0.2.9.tar.gz
    python tests/integrations/importers_data/generate.py auto_gptq autoawq-0.2.9     # needs transformers
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def load_gptq(folder: Path) -> type:
    path = folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


def load_awq(folder: Path) -> tuple[type, object]:
    # The package's own __init__ imports the whole quantizer; a bare package in its place leads to the one module.
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    gemm = importlib.import_module("awq.modules.linear.gemm")
    return gemm.WQLinear_GEMM, gemm.dequantize_gemm


def source(rows: int, columns: int, group_size: int, bits: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Codes, zeros and scales that use both ends of each range."""
    torch.manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns))
    codes[0], codes[1] = 0, 2**bits - 1
    zeros = torch.randint(1, 2**bits, (rows, groups))
    zeros[2], zeros[3] = 1, 2**bits - 1
    scales = (torch.rand(rows, groups) * 0.1 + 1e-3).half().float()
    scales[4] = 2.0**-24
    scales[5] = 16.0
    return codes, zeros, scales


def main(gptq_folder: Path, awq_folder: Path) -> None:
    gptq = load_gptq(gptq_folder)
    for bits in (2, 3, 4):
        for act_order in (False, True):
            rows, columns, group_size = 32, 96, 64  # the last group is shorter
            codes, zeros, scales = source(rows, columns, group_size, bits, bits)
            g_idx = torch.arange(columns, dtype=torch.int32) // group_size
            if act_order:
                g_idx = g_idx[torch.randperm(columns)]
            linear = torch.nn.Linear(columns, rows, bias=False)
            linear.weight.data = scales[:, g_idx.long()] * (codes - zeros[:, g_idx.long()])
            layer = gptq(bits, group_size, columns, rows, False, weight_dtype=torch.float32)
            layer.pack(linear, scales, zeros.clone(), g_idx)
            values = layer(torch.eye(columns)).t()  # its own dequantization in float32, column by column
            np.savez_compressed(
                HERE / f"auto_gptq_w{bits}{'_act_order' if act_order else ''}.npz",
                qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales.half(), g_idx=layer.g_idx,
                values=values.numpy(),
            )  # fmt: skip
    awq, dequantize = load_awq(awq_folder)
    rows, columns, group_size = 32, 96, 32
    codes, zeros, scales = source(rows, columns, group_size, 4, 4)
    zeros[6] = 0
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = scales.repeat_interleave(32, dim=1) * (codes - zeros.repeat_interleave(32, dim=1))
    layer = awq.from_linear(linear, 4, group_size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    np.savez_compressed(
        HERE / "autoawq_gemm.npz", qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales,
        values=dequantize(layer.qweight, layer.qzeros, layer.scales.float(), 4, group_size).t().numpy(),
        values_half=dequantize(layer.qweight, layer.qzeros, layer.scales, 4, group_size).t().numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
