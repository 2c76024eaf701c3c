"""Calls of lut_linear with act_bits 4 and 8, whose launches the PTX executor runs."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch
from cuda_blob import pack
from ptx import Buffer, HostProgram, Memory

from rcp_kernels.formats import PackedWeight
from rcp_kernels.ops import reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TYPE_NUMBER = {"float32": 0, "float16": 1, "bfloat16": 2}
STEP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # rounding of the cast to y, relative


@cache
def program(bits: int, arch: str) -> HostProgram:
    return HostProgram(
        """
#include "rcp/cuda/lut_linear_integer.cuh"
using namespace rcp::cuda;
extern "C" {
static LutLinearCall call_of(int64_t tokens, int64_t rows, int64_t columns, int64_t group, int64_t act_bits,
                             int64_t type, int64_t rotation) {
  LutLinearCall call{};
  call.x_type = static_cast<rcp::FloatType>(type);
  call.tokens = tokens, call.rows = rows, call.columns = columns;
  call.bits = WEIGHT_BITS, call.group_size = static_cast<int>(group);
  call.act_bits = static_cast<int>(act_bits), call.clip = 1.0f;
  call.rotation_group = static_cast<int>(rotation / 2), call.rotation_sequency = rotation % 2;
  return call;
}
int64_t total_bytes(int64_t rows, int64_t columns, int64_t group) {
  return CudaLayout{rows, columns, group, WEIGHT_BITS}.total_bytes();
}
int64_t workspace_bytes(int64_t sms, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int64_t act_bits,
                        int64_t type, int64_t rotation) {
  const LutLinearCall call = call_of(tokens, rows, columns, group, act_bits, type, rotation);
  return plan_lut_linear(call, static_cast<int>(sms), CAPABILITY).workspace_bytes();
}
int64_t counter_bytes(int64_t sms, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int64_t act_bits,
                      int64_t type, int64_t rotation) {
  const LutLinearCall call = call_of(tokens, rows, columns, group, act_bits, type, rotation);
  return plan_lut_linear(call, static_cast<int>(sms), CAPABILITY).counter_bytes;
}
// The row tiles of a block, the blocks along the rows and the splits; whether launches may begin early.
int64_t plan_part(int64_t part, int64_t sms, int64_t tokens, int64_t rows, int64_t columns, int64_t group,
                  int64_t capability) {
  const LutLinearCall call = call_of(tokens, rows, columns, group, 4, 1, 0);
  const LutLinearPlan plan = plan_lut_linear(call, static_cast<int>(sms), static_cast<int>(capability));
  return part == 0 ? plan.row_tiles : part == 1 ? plan.grid_x : part == 2 ? plan.splits : plan.early_launch;
}
int run(const uint8_t* weight, const void* x, const void* bias, int64_t bias_type, void* y, void* workspace,
        unsigned* counters, double clip, int64_t sms, int64_t tokens, int64_t rows, int64_t columns, int64_t group,
        int64_t act_bits, int64_t type, int64_t rotation) {
  LutLinearCall call = call_of(tokens, rows, columns, group, act_bits, type, rotation);
  call.weight = weight, call.x = x, call.bias = bias, call.bias_type = static_cast<rcp::FloatType>(bias_type);
  call.y = y, call.workspace = workspace, call.counters = counters, call.clip = static_cast<float>(clip);
  return lut_linear_integer<WEIGHT_BITS>(call, plan_lut_linear(call, static_cast<int>(sms), CAPABILITY));
}
}
""",
        arch=arch,
        defines={"WEIGHT_BITS": bits, "CAPABILITY": arch.split("_")[1]},
    )


def random_weight(bits: int, rows: int, columns: int, group: int, unit_scales: bool, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-128, 128, (rows, groups, 1 << bits), generator=generator).sort(-1).values.to(torch.int8)
    scales = torch.rand(rows, groups, generator=generator) * 200
    scales = torch.ones_like(scales) if unit_scales else scales
    return PackedWeight.pack(
        codes, levels, scales.to(torch.float16), 1.0 if unit_scales else 2.0**-15, bits=bits, group_size=group
    )


class Run:
    """One call of the launcher: y as float64 [tokens, rows], and the counts of its launches."""

    def __init__(
        self,
        weight: PackedWeight,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        act_bits: int = 4,
        clip: float = 1.0,
        rotation: tuple[int, bool] = (0, False),
        misaligned: int = 0,
        arch: str = "sm_80",
        sms: int = 4,
        order: str | int = "ascending",
        blob: np.ndarray | None = None,
        early_buffers: tuple[str, ...] = ("weight", "bias"),
    ) -> None:
        kind = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
        runner, memory = program(weight.bits, arch), Memory()
        shape = (weight.out_features, weight.in_features, weight.group_size)
        blob = pack(weight) if blob is None else blob
        runner.library.total_bytes.restype = runner.library.workspace_bytes.restype = ctypes.c_int64
        runner.library.counter_bytes.restype = ctypes.c_int64
        assert blob.size == runner.library.total_bytes(*map(ctypes.c_int64, shape))
        problem = (x.shape[0], *shape, act_bits, TYPE_NUMBER[kind], 2 * rotation[0] + rotation[1])
        workspace_bytes = runner.library.workspace_bytes(*map(ctypes.c_int64, (sms, *problem)))
        counter_bytes = runner.library.counter_bytes(*map(ctypes.c_int64, (sms, *problem)))
        held = x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32).numpy()
        y = memory.output("y", (x.shape[0], weight.out_features), np.float32 if kind == "float32" else np.uint16)
        counters = memory.allocate("counters", np.zeros(max(counter_bytes, 4) // 4, np.uint32), writable=True)
        bias_kind, bias_buffer = 0, None
        if bias is not None:
            bias_kind = next(TYPE_NUMBER[name] for name, dtype in DTYPES.items() if dtype == bias.dtype)
            bias_held = bias.view(torch.int16 if bias.element_size() == 2 else torch.int32).numpy()
            bias_buffer = memory.allocate("bias", bias_held)
        workspace: Buffer | None = None
        if workspace_bytes:
            workspace = memory.output("workspace", (workspace_bytes,), np.uint8)
        code, self.counts = runner.call(
            "run",
            memory,
            memory.allocate("weight", blob),
            memory.allocate("x", held, misaligned=misaligned),
            bias_buffer,
            bias_kind,
            y,
            workspace,
            counters,
            clip,
            sms,
            *problem,
            order=order,
            early_buffers=early_buffers,
        )
        assert code == 0
        assert not counters.numpy().any()
        self.bits = y.numpy()
        self.y = torch.from_numpy(self.bits.view(np.float32 if kind == "float32" else np.int16).copy())
        self.y = (self.y if kind == "float32" else self.y.view(x.dtype)).to(torch.float64)


def rotated(x: torch.Tensor, rotation: tuple[int, bool]) -> torch.Tensor:
    if not rotation[0]:
        return x
    order = "sequency" if rotation[1] else "natural"
    return reference.walsh_transform(x, order=order, group_size=rotation[0], dtype=torch.float32).to(x.dtype)


def random_x(tokens: int, columns: int, kind: str, seed: int = 1) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, columns // 3] *= 8.0
    return x.to(DTYPES[kind])
