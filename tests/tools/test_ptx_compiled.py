"""CUDA C++ through nvcc and the executor: kernels, and host code that launches them."""

import ctypes

import numpy as np
import pytest
from ptx import HostProgram, Memory, PtxError, build, compile_ptx, launch, parse

RANDOM = np.random.default_rng(9)

# Rows of half precision, normalised: sum of squares over a block, then a product, with a tail.
SOURCE = r"""
#include <cuda_fp16.h>
#include <cstdint>

struct Problem {
  const __half* x;
  __half* y;
  uint32_t* blocks_done;
  float* largest;
  float* partial;
  int rows, columns;
  float factor;
};

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <int WARPS>
__global__ void __launch_bounds__(32 * WARPS) normalise(Problem p) {
  extern __shared__ float row[];
  __shared__ float sums[WARPS];
  __shared__ bool last;
  const __half* x = p.x + static_cast<int64_t>(blockIdx.x) * p.columns;
  float total = 0.f, largest = 0.f;
  for (int i = threadIdx.x; i < p.columns + TAIL; i += blockDim.x) {
    const float value = __half2float(x[i]);
    row[i] = value;
    total = fmaf(value, value, total);
    largest = fmaxf(largest, fabsf(value));
  }
  total = warp_sum(total);
  largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
  SYNC;
  total = 0.f;
  for (int w = 0; w < WARPS; ++w) total += sums[w];
  const float scale = p.factor / sqrtf(total);
  for (int i = threadIdx.x; i < p.columns; i += blockDim.x)
    p.y[static_cast<int64_t>(blockIdx.x) * p.columns + i] = __float2half(row[p.columns - 1 - i] * scale);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, sums[w]);
    p.partial[blockIdx.x] = largest;
    FENCE;
    last = atomicInc(p.blocks_done, gridDim.x - 1) == gridDim.x - 1;
    FENCE;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  for (int b = 0; b < gridDim.x; ++b) largest = fmaxf(largest, __ldcg(p.partial + b));
  *p.largest = largest;
}

extern "C" int run(const __half* x, __half* y, uint32_t* done, float* largest, float* partial, int64_t rows,
                   int64_t columns, double factor, void* clear) {
  if (clear != nullptr) cudaMemsetAsync(clear, 0, 4, nullptr);
  const Problem p{x, y, done, largest, partial, static_cast<int>(rows), static_cast<int>(columns),
                  static_cast<float>(factor)};
  normalise<2><<<static_cast<unsigned>(rows), 64, columns * sizeof(float)>>>(p);
  return cudaGetLastError();
}

extern "C" int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}
"""
DEFINES = {"SYNC": "__syncthreads()", "FENCE": "__threadfence()", "TAIL": 0}


def run(rows=5, columns=301, arch="sm_80", clear=False, **changes):
    program = HostProgram(SOURCE, arch, (), DEFINES | changes.pop("defines", {}), sm_count=46)
    memory = Memory()
    x = RANDOM.normal(size=(rows, columns)).astype(np.float16)
    start = np.full(1, 99 if clear else 0, np.uint32)
    buffers = [memory.allocate("x", x, misaligned=2), memory.output("y", x.shape, np.float16)]
    buffers += [memory.allocate("done", start, writable=True), memory.output("largest", 1, np.float32)]
    buffers += [memory.output("partial", rows, np.float32)]
    result, launches = program.call(
        "run", memory, *buffers, rows, columns, 2.0, buffers[2] if clear else None, **changes
    )
    assert result == 0
    wanted = 2 * x.astype("f8") / np.sqrt((x.astype("f8") ** 2).sum(1, keepdims=True))
    assert np.abs(buffers[1].numpy() - wanted[:, ::-1]).max() <= 2.0**-11 * np.abs(wanted).max()
    assert buffers[3].numpy()[0] == np.abs(x).max()
    assert buffers[2].numpy()[0] == 0
    assert program.call("multiprocessors", memory) == (46, [])
    return launches[0]


@pytest.mark.parametrize("options", [{}, {"blocks_at_once": 1}, {"order": "descending"}, {"order": 4, "clear": True}])
def test_a_program(options):
    counters = run(**options)
    assert (counters.blocks, counters.threads) == (5, 320)
    assert not counters.uses_local_memory
    assert counters.buffers["x"].used_bytes == 5 * 301 * 2


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_other_architectures(arch):
    run(arch=arch)


@pytest.mark.parametrize(
    ("defines", "message"),
    [
        ({"SYNC": "__syncwarp()"}, "race in shared memory|uninitialised read"),
        ({"FENCE": ""}, "race in global memory"),
        ({"TAIL": 1}, r"out of bounds|uninitialised"),
    ],
)
def test_faults_are_found_in_any_order(defines, message):
    for options in ({}, {"blocks_at_once": 1}, {"order": 2}):
        with pytest.raises(PtxError, match=message):
            run(defines=defines, **options)


def test_kernels_are_kept_once_compiled(monkeypatch):
    source = 'extern "C" __global__ void twice(int* x) { x[threadIdx.x] *= 2; }\n__global__ void other() {}'
    first = compile_ptx(source, "sm_86", ())
    monkeypatch.setattr(build.subprocess, "run", None)
    assert compile_ptx(source, "sm_86", ()) == first
    module = parse(first)
    assert module.target == "sm_86"
    assert module.kernel("other").name == "_Z5otherv"
    memory = Memory()
    x = memory.allocate("x", np.arange(7, dtype=np.int32), writable=True)
    launch(module, "twice", memory, 1, 7, [x])
    assert x.numpy().tolist() == list(range(0, 14, 2))


def test_a_header_that_changed_is_compiled_again(tmp_path):
    header = tmp_path / "number.h"
    source = '#include "number.h"\nextern "C" __global__ void f(int* x) { *x = NUMBER; }'
    for number in (3, 4):
        header.write_text(f"#define NUMBER {number}\n")
        memory = Memory()
        x = memory.output("x", 1, np.int32)
        launch(parse(compile_ptx(source, "sm_80", (tmp_path,))), "f", memory, 1, 1, [x])
        assert x.numpy()[0] == number


def test_source_that_does_not_compile():
    with pytest.raises(RuntimeError, match=r"(?s)nvcc must compile the source, got.*error.*nonsense"):
        compile_ptx("nonsense;", "sm_80", ())


def test_structures_by_value():
    class Inner(ctypes.Structure):
        _fields_ = (("small", ctypes.c_uint8), ("wide", ctypes.c_double), ("three", ctypes.c_int16 * 3))

    source = """
struct Inner { unsigned char small; double wide; short three[3]; };
extern "C" __global__ void f(char before, Inner inner, short after, double* y) {
  y[threadIdx.x] = before + inner.small * inner.wide + inner.three[threadIdx.x] + after;
}
"""
    memory = Memory()
    y = memory.output("y", 3, np.float64)
    inner = Inner(200, 0.5, (ctypes.c_int16 * 3)(-1, 2, -3))
    launch(parse(compile_ptx(source, "sm_80", ())), "f", memory, 1, 3, [-5, inner, -7, y])
    assert y.numpy().tolist() == [-5 + 100 + three - 7 for three in (-1, 2, -3)]


MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
__global__ void square(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] * x[i];
}
int main(int argc, char** argv) {
  const int n = std::atoi(argv[1]);
  std::vector<float> x(n), y(n);
  for (int i = 0; i < n; ++i) x[i] = i / 8.f;
  float *on_device, *result;
  cudaStream_t stream;
  if (cudaMalloc(&on_device, 4 * n) || cudaMalloc(&result, 4 * n) || cudaStreamCreate(&stream)) return 1;
  cudaMemcpyAsync(on_device, x.data(), 4 * n, cudaMemcpyHostToDevice, stream);
  if (argc == 2) square<<<(n + 63) / 64, 64, 0, stream>>>(on_device, result, n);
  if (cudaStreamSynchronize(stream)) return 2;
  cudaMemcpy(y.data(), result, 4 * n, cudaMemcpyDeviceToHost);
  for (int i = 0; i < n; ++i)
    if (y[i] != x[i] * x[i]) return 3;
  cudaFree(result);
  return cudaFree(on_device);
}
"""


def test_a_whole_program():
    program = HostProgram('extern "C" int program(int, char**);\n#define main program\n' + MAIN, "sm_80", ())

    def call(*words):
        arguments = (ctypes.c_char_p * (len(words) + 1))(b"program", *words)
        return program.call("program", Memory(), ctypes.c_int(len(arguments)), arguments)

    result, (counters,) = call(b"100")
    assert (result, counters.blocks) == (0, 2)
    with pytest.raises(PtxError, match="source must be initialised"):
        call(b"100", b"no kernel")
