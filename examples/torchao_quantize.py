"""Quantize SmolLM2-135M by torchao's quantize_: python examples/torchao_quantize.py [DIRECTORY of the float model]"""

import copy
import sys

import torch
from smollm2 import load
from torch import nn
from torchao.quantization import quantize_

from rcp_kernels import quantize_model
from rcp_kernels.integrations.torchao import RcpWeightConfig


@torch.no_grad()
def main(directory: str | None = None) -> None:
    model, tokenizer = load(directory)
    model.model.layers = model.model.layers[:6]  # what follows takes seconds, and no longer on all 30
    reference = copy.deepcopy(model)
    config = RcpWeightConfig(bits=3, group_size=64, act_bits=8, levels="uniform")
    quantize_(model, config, filter_fn=lambda module, name: type(module) is nn.Linear and name != "lm_head")
    print(model.model.layers[0].mlp.down_proj)

    report = quantize_model(reference, bits=3, group_size=64, act_bits=8, levels="uniform")
    ids = tokenizer("Round to nearest needs no text.", return_tensors="pt").input_ids
    same = torch.equal(model(ids).logits, reference(ids).logits)
    print(f"{report.bits_per_weight:.3f} bits a weight, as quantize_model does it: bit-equal logits: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
