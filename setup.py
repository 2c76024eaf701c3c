"""Builds ``rcp_kernels._C`` and, with nvcc, ``rcp_kernels._C_cuda`` against the LibTorch stable ABI.

One ``cp310-abi3`` wheel serves many torches and Pythons. RCP_CUDA=0 leaves the CUDA kernels out, RCP_CUDA=1 demands
them, and without either they are built where nvcc is found.

Everything else about the package is in pyproject.toml; what the flags buy is in docs/build.md.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    raise SystemExit(
        f"rcp-kernels is compiled against torch's headers, and this environment has no usable torch ({error}). "
        "Install torch>=2.10 here first, or drop --no-build-isolation so that pip fetches one for the build."
    ) from error

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402

CUDA = "rcp_kernels._C_cuda"


def sources(pattern: str) -> list[str]:
    """Paths relative to this file, as setuptools wants them, in an order that no file system decides."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


class IncrementalBuild(BuildExtension):
    """Keeps object files where ninja finds them again, so that an edit of one file recompiles one file.

    An option of setup() would not do: an editable build ignores it and compiles in a new temporary directory each time.
    """

    def finalize_options(self) -> None:
        self.build_temp = "build/objects"
        super().finalize_options()

    def build_extension(self, extension: Extension) -> None:
        # Not torch's CUDAExtension: that refuses a torch without CUDA, against whose headers this compiles as well.
        if extension.name == CUDA:
            cuda_toolkit.build(
                cuda_toolkit.required(), Path(self.get_ext_fullpath(CUDA)), Path(self.build_temp) / "cuda"
            )
        else:
            super().build_extension(extension)


compile_args = [
    "-O3",
    "-std=c++17",
    # The numerics contract says where a product and a sum are fused: std::fma there, nowhere else. GCC fuses wherever
    # it likes by default, and then an ISA with FMA and one without would differ in the last bit.
    "-ffp-contract=off",
    "-fvisibility=hidden",
    # CPython's own build flags ask for -g, which makes the library several times larger.
    "-g0",
    "-Wall",
    # GCC 12 says this of its own AVX-512 intrinsics, whose "undefined" register is a variable initialised with itself.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    # The oldest torch that the library must load on. torch itself adds Py_LIMITED_API, because of py_limited_api.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]

extensions = [
    CppExtension(
        "rcp_kernels._C",
        sources=sources("csrc/cpu/*.cpp"),
        # Absolute, because ninja compiles from another directory.
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc/include")],
        depends=sources("csrc/**/*.h"),
        extra_compile_args=compile_args,
        py_limited_api=True,
    )
]
compiler = []
if cuda_toolkit.wanted():
    # No sources: torch would look for its own CUDA compiler.
    extensions.append(Extension(CUDA, sources=[], py_limited_api=True))
    # pip asks with egg_info what to fetch into the environment it builds in. Any other command would unpack eggs here.
    if "egg_info" in sys.argv and cuda_toolkit.find_nvcc() is None:
        compiler = cuda_toolkit.requirements()

setup(
    ext_modules=extensions,
    setup_requires=compiler,
    cmdclass={"build_ext": IncrementalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
