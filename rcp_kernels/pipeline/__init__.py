"""Whole jobs: from a float model to a directory, and from a directory to figures."""
