"""Benchmarks of ``rcp-kernels bench``. Every number is taken together with its competitors in one run."""
