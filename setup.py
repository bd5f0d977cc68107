"""Builds lora_fused._C with CMake and ninja.

The native module is optional: without a C++ compiler, or on a machine that its kernels do not
serve, the package installs without it and the `torch` backend serves every call. Set
LORA_FUSED_REQUIRE_NATIVE=1 to turn a failed native build into an error.

Its CUDA part joins where an nvcc is found (see csrc/cuda/build.cmake, which also names the
variables that choose compiler and targets). Where that part does not build, the CPU kernels are
built alone; LORA_FUSED_CUDA=ON makes it an error, LORA_FUSED_CUDA=OFF leaves it out.
"""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_SETTINGS = ("LORA_FUSED_CUDA_ARCH_LIST", "LORA_FUSED_NVCC")


def program(package: str, directory: str) -> str:
    """A program from its PyPI package, which pip may leave off the PATH; else the system's."""
    try:
        return str(Path(getattr(importlib.import_module(package), directory)) / package)
    except (ImportError, AttributeError):
        return shutil.which(package) or package


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_with_cuda_or_without(target.parent)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("LORA_FUSED_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"lora_fused: the native kernels were not built ({error}); "
                "the package installs without them and the torch backend serves every call.",
                file=sys.stderr,
            )

    def build_with_cuda_or_without(self, output_dir: Path) -> None:
        cuda = os.environ.get("LORA_FUSED_CUDA", "AUTO")
        try:
            self.configure_and_build(output_dir, cuda)
        except subprocess.CalledProcessError as error:
            if cuda != "AUTO":
                raise
            print(
                f"lora_fused: the build failed ({error}); trying again without the CUDA kernels.",
                file=sys.stderr,
            )
            self.configure_and_build(output_dir, "OFF")

    def configure_and_build(self, output_dir: Path, cuda: str) -> None:
        import pybind11

        # setuptools builds editable installs in a directory that it then removes; this one stays,
        # so that an install compiles what has changed since the last one and no more.
        build_dir = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        cmake = program("cmake", "CMAKE_BIN_DIR")
        subprocess.run(
            [
                cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={program('ninja', 'BIN_DIR')}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DLORA_FUSED_CUDA={cuda}",
                *(f"-D{name}={os.environ.get(name, '')}" for name in CUDA_SETTINGS),
                *os.environ.get("CMAKE_ARGS", "").split(),
            ],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", str(build_dir)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs copy what was built; a module that was not built is left out."""
        built = [
            e for e in self.extensions if (Path(self.build_lib) / self.filename_of(e)).exists()
        ]
        self.extensions = built
        super().copy_extensions_to_source()

    def filename_of(self, ext: Extension) -> str:
        return self.get_ext_filename(self.get_ext_fullname(ext.name))


setup(
    ext_modules=[Extension("lora_fused._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
