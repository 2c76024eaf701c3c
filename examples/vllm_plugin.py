"""What vLLM does with the layers of a quantized SmolLM2-135M: python examples/vllm_plugin.py [DIRECTORY]

Makes a decoder layer of vLLM's parallel layers, loads it for one rank and for each of three, and compares with
transformers. vLLM's wheels have no kernels for a CPU, so that no engine runs here; without vLLM, its classes are the
stand-in of tests/integrations/vllm_contract.py. DIRECTORY is one that `rcp-kernels quantize` wrote; without it, one
is made.
"""

import contextlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from smollm2 import load

from rcp_kernels import quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, load_quantized, read_quantization_config, save_quantized

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import vllm_contract

with contextlib.nullcontext() if importlib.util.find_spec("vllm") else vllm_contract.installed():
    from vllm.model_executor.layers import linear as vllm_linear
    from vllm.model_executor.layers.quantization import get_quantization_config

    from rcp_kernels.integrations.vllm import register

BLOCK = "model.layers.0."
LAYERS = {
    "self_attn.qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "mlp.gate_up_proj": {"gate_proj": 0, "up_proj": 1},
    "self_attn.o_proj": {"o_proj": None},
    "mlp.down_proj": {"down_proj": None},
}


def make(name, sizes, config):
    """The layer as vLLM's llama makes it."""
    common = {"bias": False, "quant_config": config, "prefix": BLOCK + name, "return_bias": False}
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    if name == "self_attn.qkv_proj":
        return vllm_linear.QKVParallelLinear(hidden, hidden // heads, heads, sizes.num_key_value_heads, **common)
    if name == "mlp.gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(hidden, [sizes.intermediate_size] * 2, **common)
    return vllm_linear.RowParallelLinear(hidden if "o_proj" in name else sizes.intermediate_size, hidden, **common)


@torch.inference_mode()
def main(directory: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None:
            directory = str(Path(scratch, "model"))
            model, _ = load()
            quantize_model(model, bits=3, group_size=64, act_bits=16, levels="uniform")
            save_quantized(model, Path(directory), QuantizationConfig(3, 64, 16))
        model, _ = load_quantized(Path(directory))
        _, stored = read_quantization_config(Path(directory))
    print("vLLM's classes" if hasattr(vllm_linear, "WEIGHT_LOADER_V2_SUPPORTED") else "the stand-in's classes")

    register()  # vLLM calls it, by the entry point
    config = get_quantization_config("rcp").from_config(stored.to_dict())
    config.packed_modules_mapping = {name.partition(".")[2]: list(parts) for name, parts in LAYERS.items()}
    state = model.state_dict()
    for name, parts in LAYERS.items():
        folder = BLOCK + name.partition(".")[0] + "."
        linears = [model.get_submodule(folder + part) for part in parts]
        x = torch.randn(7, linears[0].in_features)
        expected = [linear(x) for linear in linears]
        for ranks in (1, 3):
            found = []
            for rank in range(ranks):
                with (
                    mock.patch.object(vllm_linear, "get_tensor_model_parallel_rank", lambda rank=rank: rank),
                    mock.patch.object(vllm_linear, "get_tensor_model_parallel_world_size", lambda ranks=ranks: ranks),
                    mock.patch.object(vllm_linear, "tensor_model_parallel_all_reduce", lambda y: y),
                ):
                    layer = make(name, model.config, config)
                    for part, shard in parts.items():
                        for key in [key for key in state if key.startswith(f"{folder}{part}.")]:
                            parameter = dict(layer.named_parameters())[key.rpartition(".")[2]]
                            parameter.weight_loader(parameter, state[key], *([] if shard is None else [shard]))
                    layer.quant_method.process_weights_after_loading(layer)
                    row = isinstance(layer, vllm_linear.RowParallelLinear)
                    found.append(layer(x.chunk(ranks, -1)[rank] if row else x))
            if row:
                total = sum(found[1:], found[0])
                what = f"within {float((total - expected[0]).abs().max() / expected[0].abs().max()):.0e}"
                if ranks == 1:
                    what = f"bit-equal: {torch.equal(total, expected[0])}"
            else:
                sizes = [linear.out_features // ranks for linear in linears]
                shards = zip(*(y.split(sizes, -1) for y in found), strict=True)
                same = [torch.equal(torch.cat(shard, -1), y) for shard, y in zip(shards, expected, strict=True)]
                what = f"bit-equal: {all(same)}"
            print(f"{name} on {ranks} {'rank' if ranks == 1 else 'ranks'}: {what}")


if __name__ == "__main__":
    main(*sys.argv[1:])
