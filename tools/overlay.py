"""Puts this interpreter's packages behind those of another virtual environment: ``python tools/overlay.py VENV``."""

import sys
import sysconfig
from pathlib import Path


def main() -> None:
    """Write a .pth file into the other environment; its own packages come first, and .pth files here are followed."""
    here = sysconfig.get_path("purelib")
    (folder,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
    (folder / "overlay.pth").write_text(f"import site; site.addsitedir({here!r})\n")


if __name__ == "__main__":
    main()
