"""Load, run and save quantized models through transformers: python examples/transformers_integration.py [DIRECTORY]

DIRECTORY is one that `rcp-kernels quantize` wrote. Without it, a tiny random model is quantized while it loads.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rcp_kernels.integrations.transformers import RcpConfig  # also registers the method "rcp" with transformers
from rcp_kernels.nn import QuantizedKVCache


def tiny_model(directory: Path) -> None:
    """Write a random two-layer model in floating point."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96}
    config = LlamaConfig(**sizes, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(directory)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?")
    directory = parser.parse_args(arguments).directory
    ids = torch.tensor([[3, 14, 15, 9, 26, 5]])
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None:
            torch.manual_seed(0)
            tiny_model(Path(scratch, "float"))
            config = RcpConfig(bits=3, group_size=32, act_bits=8, rotation="gsr")
            model = AutoModelForCausalLM.from_pretrained(Path(scratch, "float"), quantization_config=config)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory)

        model.save_pretrained(Path(scratch, "saved"))
        again = AutoModelForCausalLM.from_pretrained(Path(scratch, "saved"))
    same = torch.equal(again(ids).logits, model(ids).logits)
    print(f"{model.config.quantization_config.stored.bits} bits, saved and loaded: bit-equal logits: {same}")
    assert same

    how = {"max_new_tokens": 8, "do_sample": False}
    print("dynamic cache  ", model.generate(ids, **how)[0].tolist())
    print("static cache   ", model.generate(ids, cache_implementation="static", **how)[0].tolist())
    cache = QuantizedKVCache(model.config)
    print("4-bit cache    ", model.generate(ids, past_key_values=cache, **how)[0].tolist())


if __name__ == "__main__":
    main()
