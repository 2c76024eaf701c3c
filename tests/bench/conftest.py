import pytest
import torch

from rcp_kernels.bench import timing


@pytest.fixture(autouse=True)
def small_and_restored(monkeypatch):
    """Data need not outgrow a cache here. Threads and instruction set are put back."""
    monkeypatch.setattr(timing, "rotated_bytes", lambda: 1 << 16)
    threads, isa = torch.get_num_threads(), torch.ops.rcp_kernels.cpu_isa()
    yield
    torch.set_num_threads(threads)
    torch.ops.rcp_kernels.set_cpu_isa(isa)
