"""A quantized SmolLM2-135M through transformers: python examples/transformers_integration.py [DIRECTORY]

DIRECTORY is one that `rcp-kernels quantize` wrote. Without it, the model is quantized while it loads.
"""

import sys
import tempfile
from pathlib import Path

import torch
from smollm2 import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcp_kernels.checkpoint import load_quantized, write_model_card
from rcp_kernels.integrations.transformers import RcpConfig
from rcp_kernels.models.hf import cache_argument
from rcp_kernels.nn import QuantizedKVCache


@torch.no_grad()
def main(directory: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None:
            directory = str(Path(scratch, "float"))
            write(Path(directory))
            config = RcpConfig(bits=3, group_size=64, act_bits=8, kv_bits=4, rotation="gsr")
            model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids

        saved = Path(scratch, "saved")
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        write_model_card(saved)
        again = AutoModelForCausalLM.from_pretrained(saved)
        plain, stored = load_quantized(saved)
        logits = model(ids).logits
        same = torch.equal(again(ids).logits, logits) and torch.equal(plain(ids).logits, logits)
        print(f"{stored.bits} bits, saved and loaded, with transformers and without: bit-equal logits: {same}")

    how = {"max_new_tokens": 8, "do_sample": False}
    caches = {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static"},
        "4-bit cache": cache_argument(model, QuantizedKVCache(model.config)),
    }
    for name, cache in caches.items():
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **how)[0, ids.shape[1] :]
        print(f"{name}: {tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
