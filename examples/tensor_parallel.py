"""A quantized SmolLM2-135M divided among three processes: python examples/tensor_parallel.py [DIRECTORY, float model]

Three, because it has nine heads and three key-value heads. Only its first four layers, so that it takes seconds.
"""

import os
import sys
import tempfile

import torch
from smollm2 import load
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from rcp_kernels import quantize_model
from rcp_kernels.integrations.tensor_parallel import RcpColwiseParallel, RcpRowwiseParallel

RANKS = 3
PLAN = {f"self_attn.{name}_proj": RcpColwiseParallel() for name in ("q", "k", "v")}
PLAN |= {f"mlp.{name}_proj": RcpColwiseParallel() for name in ("gate", "up")}
PLAN |= {"self_attn.o_proj": RcpRowwiseParallel(), "mlp.down_proj": RcpRowwiseParallel()}


@torch.inference_mode()
def rank_main(rank, store, model, ids):
    expected = model(ids).logits
    up = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 576)
    whole = up(x)

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), {f"model.layers.*.{k}": v for k, v in PLAN.items()})
    logits = model(ids).logits
    if rank == 0:
        same = torch.equal(up(x), whole.chunk(RANKS, -1)[rank])
        error = float((logits - expected).norm() / expected.norm())
        print(f"column-parallel {tuple(up.shard.dequantize().shape)}: bit-equal: {same}")
        print(f"logits of {RANKS} processes differ by {error:.1e}: within 1e-2: {error < 1e-2}")
    torch.distributed.barrier()  # a process that leaves first may be aborted
    torch.distributed.destroy_process_group()


def main(directory: str | None = None) -> None:
    torch.set_num_threads(1)  # the processes are forks, and torch's pool of threads does not survive one
    model, tokenizer = load(directory)
    model = model.float()
    model.model.layers = model.model.layers[:4]
    quantize_model(model, bits=3, group_size=64, act_bits=8, levels="uniform")
    ids = tokenizer("Each process holds a third of every layer.", return_tensors="pt").input_ids
    torch.manual_seed(0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them on this machine
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", model, ids)
        torch.multiprocessing.start_processes(rank_main, arguments, RANKS, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
