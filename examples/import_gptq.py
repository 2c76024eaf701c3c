"""Run a GPTQ checkpoint's layers here: python examples/import_gptq.py [DIRECTORY of the float model]

There is no GPTQ checkpoint of SmolLM2-135M at hand, so some of its layers are written in that layout first: 4 bits,
symmetric, groups of 64, round to nearest.
"""

import sys

import torch
from smollm2 import load
from torch import Tensor, nn

from rcp_kernels import QuantLinear
from rcp_kernels.integrations.importers import import_gptq

BITS, GROUP = 4, 64


def write_gptq(weight: Tensor, prefix: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer as AutoGPTQ and GPTQModel store them, and the weight that they stand for."""
    out_features, in_features = weight.shape
    groups = weight.float().view(out_features, -1, GROUP)
    scales = (groups.abs().amax(-1) / 7.5).half()
    codes = torch.round(groups / scales.float()[..., None] + 8).clamp(0, 15).long()
    shifts = torch.arange(0, 32, BITS)
    rows = codes.view(out_features, in_features).T.reshape(in_features // 8, 8, out_features)
    qweight = (rows << shifts[None, :, None]).sum(1)
    tensors = {
        f"{prefix}qweight": torch.where(qweight >= 2**31, qweight - 2**32, qweight).to(torch.int32),
        f"{prefix}qzeros": torch.full((in_features // GROUP, out_features // 8), 0x77777777, dtype=torch.int32),
        f"{prefix}scales": scales.T.contiguous(),
    }
    return tensors, ((codes - 8) * scales.float()[..., None]).view(out_features, in_features)


@torch.no_grad()
def main(directory: str | None = None) -> None:
    model, tokenizer = load(directory)
    model = model.float()
    model.model.layers = model.model.layers[:6]
    block = model.model.layers[0]
    ids = tokenizer("Nothing is quantized a second time.", return_tensors="pt").input_ids
    exact, packed = True, {}
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            tensors, weight = write_gptq(linear.weight, f"{name}.")
            imported = import_gptq(tensors, f"{name}.", bits=BITS, group_size=GROUP)
            exact = exact and imported.error == 0.0 and torch.equal(imported.dequantize(), weight)
            packed[name] = QuantLinear.from_imported(imported, act_bits=16)
            linear.weight.copy_(weight)
    expected = model(ids).logits
    for name, layer in packed.items():
        block.set_submodule(name, layer)
    difference = float((model(ids).logits - expected).abs().max() / expected.abs().max())
    print(f"{len(packed)} layers imported: every weight exact: {exact}")
    # Inputs of 16-bit layers are rounded to bfloat16 on their way into the products.
    print(f"logits within 1 % of the dequantized model's: {difference < 0.01} ({difference:.1e})")


if __name__ == "__main__":
    main(*sys.argv[1:])
