"""Registers our method with transformers as soon as both packages are imported, in either order.

A directory of ours that transformers loads without it gets layers of random numbers. Importing transformers' model code
here would take seconds, for users of the layer alone too: hence a hook that waits for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

# from_pretrained and save_pretrained are defined here: once it is imported, all that we need of transformers is.
_TRIGGER = "transformers.modeling_utils"


def install() -> None:
    """Register now if transformers' model code is imported already, else when it will be. A second call does nothing.

    With a transformers that is too old a warning says that saved models cannot be loaded.
    """
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        importlib.import_module("rcp_kernels.integrations.transformers")
    except ImportError as error:
        warnings.warn(f"rcp_kernels: models of rcp-kernels cannot be loaded or saved: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the trigger as the other finders do, with a loader that registers after it.

    It stays until the module has been imported: others may ask for the spec only, and an import may fail.
    """

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and the registration after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        _register()
