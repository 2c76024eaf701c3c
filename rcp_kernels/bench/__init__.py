"""Benchmarks: every number is taken against its competitors in the same run (docs/benchmarks.md)."""
