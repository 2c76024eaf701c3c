"""Registers the method ``"rcp"`` with transformers when both packages are imported, in either order.

Without the registration transformers fills the packed layers of a model with random numbers. Importing transformers'
model code here would take seconds, also for users of the layer alone. An import hook therefore registers after it.
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

# This module defines from_pretrained and save_pretrained.
_TRIGGER = "transformers.modeling_utils"


def install() -> None:
    """Register now if transformers' model code is imported, else when it is imported. A second call does nothing.

    If transformers is too old, a warning says that saved models cannot be loaded.
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
    """Finds the trigger module with the other finders, and gives it a loader that registers after the import.

    The finder stays until the module has been imported, as code may ask for the spec only, and an import may fail.
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
    """Runs another loader, and registers after it."""

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
