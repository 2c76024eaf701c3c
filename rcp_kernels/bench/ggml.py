"""ggml's CPU matrix product, through ctypes and ggml's public C API (ggml.h, ggml-backend.h, ggml-cpu.h).

The library is the one in PyPI's llama-cpp-python, or in a given folder. Weights are in ggml's plain row layout, as in a
GGUF file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from .driver import Peer
from .timing import copies_needed

# name -> ggml_type, which GGUF files store too, and the block length along a row.
_F32 = 0
_TYPES = {"Q2_K": (10, 256), "Q4_0": (2, 32), "TQ2_0": (35, 256)}

_GRAPH_NODES = 8  # a matrix product and its two inputs take 3
_QUANTIZED_ROWS = 256  # these rows are quantized and then repeated: ggml's search for Q2_K is slow


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    ),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_gallocr_new": (c_void_p, (c_void_p,)),
    "ggml_gallocr_alloc_graph": (c_bool, (c_void_p, c_void_p)),
    "ggml_gallocr_free": (None, (c_void_p,)),
}


def find_library(folder: Path | None = None) -> Path | None:
    """Path of ggml's CPU library below folder, by default that of the installed llama-cpp-python. None without any."""
    if folder is None:
        # Located, not imported: an import of llama_cpp loads all of llama.cpp.
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
    return next(iter(sorted(folder.rglob("libggml-cpu*.so*"))), None)


class Ggml:
    """A loaded ggml with a CPU backend of its own."""

    types = tuple(_TYPES)

    def __init__(self, library: Path) -> None:
        """Load library.

        Raises:
            OSError: it cannot be loaded, or lacks a function of the API.
        """
        # libggml-base is loaded as its dependency, and its symbols are found through it.
        self.api = ctypes.CDLL(str(library))
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self.api, name)
            except AttributeError:
                raise OSError(f"{library} has no {name}; install a ggml of another version") from None
            function.restype, function.argtypes = result, arguments
        self.backend = self.api.ggml_backend_cpu_init()
        weakref.finalize(self, self.api.ggml_backend_free, self.backend)

    def linear(self, type_name: str, out_features: int, in_features: int) -> Peer | None:
        """ggml's matrix product with a random weight in one of its formats, and float32 x. None where blocks do not
        divide rows."""
        type_id, block = _TYPES[type_name]
        if in_features % block:
            return None
        values = torch.randn(min(_QUANTIZED_ROWS, out_features), in_features) * in_features**-0.5
        nbytes = int(self.api.ggml_row_size(type_id, in_features)) * out_features
        copies = copies_needed(nbytes)
        weights = Weights(self, type_name, values, out_features, copies)
        return Peer(lambda batch: weights.bind(batch, torch.get_num_threads()), nbytes, copies)

    def context(self, mem_size: int) -> int:
        """A ggml context for mem_size bytes of headers. Its tensors have no data."""
        context: int | None = self.api.ggml_init(_InitParams(mem_size, None, True))
        if not context:
            raise MemoryError(f"ggml_init failed for {mem_size} bytes")
        return context


class Weights:
    """Copies of one weight in ggml's memory. The rows of `values`, float32 [rows, K], repeat to out_features rows."""

    def __init__(self, ggml: Ggml, type_name: str, values: torch.Tensor, out_features: int, copies: int) -> None:
        rows, in_features = values.shape
        type_id = _TYPES[type_name][0]
        api = ggml.api
        self.ggml = ggml
        self.out_features, self.in_features = out_features, in_features
        row_bytes = int(api.ggml_row_size(type_id, in_features))
        part = torch.empty(rows * row_bytes, dtype=torch.uint8)
        source = ctypes.cast(values.contiguous().data_ptr(), POINTER(c_float))
        api.ggml_quantize_chunk(type_id, source, part.data_ptr(), 0, rows, in_features, None)
        data = part.repeat(-(-out_features // rows))[: out_features * row_bytes].contiguous()

        context = ggml.context((copies + 1) * api.ggml_tensor_overhead())
        self.tensors = [api.ggml_new_tensor_2d(context, type_id, in_features, out_features) for _ in range(copies)]
        buffer = api.ggml_backend_alloc_ctx_tensors(context, ggml.backend)
        weakref.finalize(self, _release, api, context, buffer)
        for tensor in self.tensors:
            api.ggml_backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)

    def bind(self, batch: int, threads: int, x: torch.Tensor | None = None) -> Product:
        """The product with x, float32 [batch, K], by default random, on this many threads."""
        return Product(self, torch.randn(batch, self.in_features) if x is None else x, threads)


class Product:
    """y = x W^T for each copy of a weight. A call takes a running number, which selects the copy."""

    def __init__(self, weights: Weights, x: torch.Tensor, threads: int) -> None:
        self.weights = weights
        self.batch = x.shape[0]
        api = self._api = weights.ggml.api
        self._backend = weights.ggml.backend
        api.ggml_backend_cpu_set_n_threads(self._backend, threads)

        input_context = weights.ggml.context(2 * api.ggml_tensor_overhead())
        input_tensor = api.ggml_new_tensor_2d(input_context, _F32, weights.in_features, self.batch)
        input_buffer = api.ggml_backend_alloc_ctx_tensors(input_context, self._backend)
        weakref.finalize(self, _release, api, input_context, input_buffer)
        x = x.float().contiguous()
        api.ggml_backend_tensor_set(input_tensor, x.data_ptr(), 0, x.nbytes)

        per_graph = api.ggml_graph_overhead_custom(_GRAPH_NODES, False) + 2 * api.ggml_tensor_overhead()
        context = weights.ggml.context((len(weights.tensors) + 1) * per_graph)
        # One allocator for all graphs, so their outputs share memory.
        allocator = api.ggml_gallocr_new(api.ggml_backend_cpu_buffer_type())
        weakref.finalize(self, api.ggml_gallocr_free, allocator)
        weakref.finalize(self, api.ggml_free, context)
        self._graphs = []
        for weight in weights.tensors:
            graph = api.ggml_new_graph_custom(context, _GRAPH_NODES, False)
            self._output = api.ggml_mul_mat(context, weight, input_tensor)
            api.ggml_build_forward_expand(graph, self._output)
            if not api.ggml_gallocr_alloc_graph(allocator, graph):
                raise MemoryError("ggml could not allocate the output of its matrix product")
            self._graphs.append(graph)

    def __call__(self, i: int) -> None:
        status = self._api.ggml_backend_graph_compute(self._backend, self._graphs[i % len(self._graphs)])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self) -> torch.Tensor:
        """y of the last call, float32 [batch, N]."""
        y = torch.empty(self.batch, self.weights.out_features)
        self._api.ggml_backend_tensor_get(self._output, y.data_ptr(), 0, y.nbytes)
        return y


def _release(api: ctypes.CDLL, context: int, buffer: int) -> None:
    api.ggml_backend_buffer_free(buffer)
    api.ggml_free(context)
