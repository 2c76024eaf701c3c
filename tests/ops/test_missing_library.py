"""Without its compiled library the package says what is missing, why, and how to get it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rcp_kernels"


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "No module named 'rcp_kernels._C'"), (b"not a library", "file too short|invalid ELF")],
)
def test_import_says_how_to_build(tmp_path: Path, library: bytes | None, reason: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rcp_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if library is not None:
        (tmp_path / "rcp_kernels" / "_C.abi3.so").write_bytes(library)
    # The copy's directory is searched first; but the finder of an editable install would supply the real library.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import rcp_kernels"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: rcp_kernels needs its compiled library rcp_kernels._C")
    assert str(tmp_path) in message
    assert re.search(reason, message)
    assert "make build" in message
    assert "pip install ." in message
