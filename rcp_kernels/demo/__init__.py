"""``rcp-kernels demo``."""
