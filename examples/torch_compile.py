"""Compile and export a quantized SmolLM2-135M: python examples/torch_compile.py [DIRECTORY [BACKEND]]

DIRECTORY is one of the float model, BACKEND inductor if none is given. Only the first two layers: seconds of compiling.
"""

import io
import sys

import torch
from smollm2 import load
from transformers import StaticCache

from rcp_kernels import quantize_model
from rcp_kernels.models.hf import cache_argument

TOKENS = 8


def decode(model, forward, prompt):
    """Greedy tokens after a prompt, by a static cache: no shape changes from one step to the next."""
    cache = StaticCache(model.config, max_cache_len=64)
    logits = model(input_ids=prompt, **cache_argument(model, cache)).logits
    found = []
    for step in range(TOKENS):
        token = logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        position = torch.tensor([[prompt.shape[1] + step]])
        logits = forward(input_ids=token, position_ids=position, **cache_argument(model, cache)).logits
    return found


@torch.no_grad()
def main(directory: str | None = None, backend: str = "inductor") -> None:
    model, tokenizer = load(directory)
    model = model.float()
    model.model.layers = model.model.layers[:2]
    quantize_model(model, bits=3, group_size=64, act_bits=16, levels="uniform")
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    same = decode(model, compiled, prompt) == decode(model, model, prompt)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{backend}: {TOKENS} tokens by {graphs} graph, as eager: {same}")

    mlp, x = model.model.layers[0].mlp, torch.randn(4, 576)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    file = io.BytesIO()
    torch.export.save(torch.export.export(mlp, (x,), dynamic_shapes=({0: tokens},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(9, 576)
    print(f"exported, saved, loaded: bit-equal: {torch.equal(loaded(x), mlp(x))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
