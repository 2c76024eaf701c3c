"""Checks, before anything is downloaded, what the Makefile cannot install: Python 3.10+, its headers, a C++ compiler.

Runs under whatever Python the user has, old ones included, so this file keeps to syntax that Python 3.6 reads.
"""

import os
import shutil
import sys
import sysconfig


def problems():
    """Sentences, each naming the rule, what was found and the remedy; an empty list when this machine can build."""
    found = []
    if sys.version_info < (3, 10):
        found.append(
            "rcp-kernels needs Python 3.10 or newer, and %s is %s; name another one: make PYTHON=python3.12 ..."
            % (sys.executable, sys.version.split()[0])
        )
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        found.append(
            "the extension is compiled against Python's headers, and there is no %s; install them (Debian and Ubuntu: "
            "apt-get install python3-dev; Fedora: dnf install python3-devel)" % header
        )
    try:
        import ensurepip  # noqa: F401  (Debian ships Python without it)
        import venv  # noqa: F401
    except ImportError as error:
        found.append(
            "the Makefile builds in a virtual environment, and this Python cannot make one (%s); Debian and Ubuntu: "
            "apt-get install python3-venv" % error
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        found.append(
            "a C++17 compiler is needed, and there is no %r on the PATH; install one (Debian and Ubuntu: apt-get "
            "install g++; Fedora: dnf install gcc-c++) or set CXX" % compiler
        )
    return found


if __name__ == "__main__":
    sys.exit("\n".join("make: " + sentence for sentence in problems()) or None)
