"""Compile and export a quantized model: python examples/torch_compile.py [BACKEND], inductor by default."""

import io
import sys

import torch
from torch import nn

from rcp_kernels import quantize_model


@torch.no_grad()
def main(backend: str = "inductor") -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256)).eval()
    quantize_model(model, bits=3, group_size=64, act_bits=8)
    x = torch.randn(4, 256)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    print(f"{backend}: largest difference from eager {float((compiled(x) - model(x)).abs().max()):.1e}")

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: tokens},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(9, 256)
    print(f"exported, saved, loaded: bit-equal: {torch.equal(loaded(x), model(x))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
