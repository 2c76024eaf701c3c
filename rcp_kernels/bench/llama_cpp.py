"""llama.cpp as a peer: decoding and prefill of a GGUF file, through ctypes and the public C API (llama.h, ggml.h).

The library is the one in PyPI's xllamacpp, or libllama of llama-cpp-python. Parameter structs are passed as opaque
blocks. Only the leading fields of llama_context_params are written: n_ctx, n_batch, n_ubatch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy
from torch import Tensor

from .. import extras

__all__ = ["Library", "LlamaCpp", "find_library"]

_PARAMETER_BYTES = 1024  # more than either struct of parameters has


class _Parameters(ctypes.Structure):
    # Passed by value on the stack: a callee that expects a shorter struct reads its leading part.
    _fields_ = (("block", c_uint32 * (_PARAMETER_BYTES // 4)),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _Parameters)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, _Parameters)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_get_one": (_Batch, (c_void_p, c_int32)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    ),
}

_PACKAGES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "libllama.so*"}


def find_library() -> Path | None:
    """Path of llama.cpp's library: llama-cpp-python's, which is built for this CPU, else xllamacpp's. None without."""
    for package in ("llama_cpp", "xllamacpp"):
        # Located, not imported: the import of a package starts its own runtime.
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob(_PACKAGES[package])):
                return path
    return None


class Library:
    """A loaded llama.cpp.

    Attributes:
        api: its functions.
        path: the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Load a library, by default the installed one.

        Raises:
            MissingExtra: none is installed.
            OSError: it cannot be loaded, or lacks a function of the API.
        """
        found = find_library() if path is None else path
        if found is None:
            extras.require("xllamacpp")
        assert found is not None
        self.path = found
        self.api = ctypes.CDLL(str(found))
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self.api, name)
            except AttributeError:
                raise OSError(f"{found} has no {name}; install another version of xllamacpp") from None
            function.restype, function.argtypes = result, arguments
        # C's abs as the logger that does nothing: llama.cpp also logs when Python can no longer be called.
        self.api.llama_log_set(ctypes.cast(ctypes.CDLL(None).abs, c_void_p), None)
        self.api.llama_backend_init()

    @property
    def features(self) -> str:
        """The instruction sets that the library uses, as llama.cpp prints them."""
        return str(self.api.llama_print_system_info().decode()).strip()

    def quantize(self, values: Tensor, kind: int) -> bytes:
        """Rows of weights, float32 [rows, columns], as blocks of ggml_type ``kind``."""
        rows, columns = values.shape
        values = values.float().contiguous()
        size = int(self.api.ggml_row_size(kind, columns)) * rows
        out = ctypes.create_string_buffer(size)
        source = ctypes.cast(values.data_ptr(), POINTER(c_float))
        self.api.ggml_quantize_chunk(kind, source, out, 0, rows, columns, None)
        return out.raw


class LlamaCpp:
    """A model of llama.cpp with one sequence. Greedy decoding."""

    def __init__(self, library: Library, file: Path, context: int) -> None:
        """Load a GGUF file.

        Args:
            library: the loaded llama.cpp.
            file: the GGUF file.
            context: tokens that the cache can hold.

        Raises:
            ValueError: llama.cpp cannot load the file.
        """
        api = self._api = library.api
        model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not model:
            raise ValueError(f"bench: llama.cpp must be able to load {file}, got an error; check its kind")
        weakref.finalize(self, api.llama_model_free, model)
        parameters = api.llama_context_default_params()
        parameters.block[0:3] = [context, context, 512]
        self._context = api.llama_init_from_model(model, parameters)
        if not self._context:
            raise ValueError(f"bench: llama.cpp must be able to run {file}, got no context of {context} tokens")
        weakref.finalize(self, api.llama_free, self._context)  # runs before the model is freed
        self._vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        self.token = 0

    def set_threads(self, threads: int) -> None:
        self._api.llama_set_n_threads(self._context, threads, threads)

    def start(self, prompt: Sequence[int]) -> None:
        """Empty the cache and run a prompt."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._decode(prompt)

    def step(self) -> None:
        """Decode one token."""
        self._decode([self.token])

    def _decode(self, tokens: Sequence[int]) -> None:
        ids = (c_int32 * len(tokens))(*tokens)
        status = self._api.llama_decode(self._context, self._api.llama_batch_get_one(ids, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        self.token = int(numpy.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
