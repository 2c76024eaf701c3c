"""The command line ``rcp-kernels``."""

from .app import main

__all__ = ["main"]
