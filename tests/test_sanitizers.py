"""Memory errors and undefined behaviour in the native code, looked for without torch.

Every entry runs over ragged shapes in a fresh interpreter, on operands of exactly the bytes that
they need: between pages that must not be touched (which also sees masked and tile instructions),
or from malloc under AddressSanitizer and UndefinedBehaviorSanitizer. This file is that program as
well: python tests/test_sanitizers.py MODULE ALLOCATOR EVERY ISA...
"""

import ctypes
import importlib.util
import itertools
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BYTES = (4, 2, 2)  # of an element, by dtype code

libc = ctypes.CDLL(None, use_errno=True)
libc.malloc.restype = libc.mmap.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Heap:
    """Blocks of exactly the size that is asked for, from malloc."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def block(self, size: int, aligned: bool = False) -> int:
        pointer = ctypes.c_void_p()
        if aligned:
            assert libc.posix_memalign(ctypes.byref(pointer), 64, size) == 0
        address = pointer.value or libc.malloc(size)
        ctypes.memset(address, 0x3C, size)  # 0x3c3c… is a small number in every dtype
        self.blocks.append(address)
        return address

    def free(self) -> None:
        for address in self.blocks:
            libc.free(address)
        self.blocks.clear()


class Pages:
    """Blocks that end where a forbidden page begins; every other one begins where one ends."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, int]] = []

    def block(self, size: int, aligned: bool = False) -> int:
        assert not aligned or size % 64 == 0  # so that both ends are aligned
        page = mmap.PAGESIZE
        inside = -(-max(size, 1) // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = libc.mmap(None, inside + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        for forbidden in (start, start + page + inside):
            assert libc.mprotect(forbidden, page, 0) == 0
        self.mapped.append((start, inside + 2 * page))
        at_start = len(self.mapped) % 4 == 0
        address = start + page + (0 if at_start else inside - size)
        ctypes.memset(address, 0x3C, size)
        return address

    def free(self) -> None:
        for address, size in self.mapped:
            assert libc.munmap(address, size) == 0
        self.mapped.clear()


ALLOCATORS: dict[str, type[Heap] | type[Pages]] = {"heap": Heap, "pages": Pages}
Operand = tuple[int, int, int]  # address, stride of rows, stride of columns
LAYOUTS = ["rows", "gap", "columns", "strided", "one row", "one value"]
SHAPES = [  # M, K, N, R
    (0, 3, 3, 2), (3, 0, 5, 2), (3, 5, 0, 2), (3, 5, 7, 0), (1, 1, 1, 1), (1, 17, 33, 3),
    (4, 33, 65, 2), (3, 130, 1030, 5), (5, 31, 63, 33), (15, 64, 64, 16), (16, 16, 130, 1),
    (33, 37, 129, 65), (32, 2060, 9, 4), (47, 1100, 70, 17), (70, 128, 31, 8), (300, 40, 515, 3),
]  # fmt: skip
# Of all problems every so many-th: primes, so that shapes, layouts, dtypes and isas all meet.
EVERY, EVERY_FULL = 43, 7
MASKS = [(0, 0), (7, 20000), (7, 65536)]  # seed, threshold


class Sweep:
    """All entries of one module on operands from one allocator."""

    def __init__(self, module: Any, allocator: str) -> None:
        self.module, self.memory, self.calls = module, ALLOCATORS[allocator](), 0

    def operand(self, rows: int, cols: int, layout: str, dtype: int) -> Operand:
        row, col = {
            "rows": (cols, 1), "gap": (cols + 3, 1), "columns": (1, rows),
            "strided": (2 * cols + 1, 2), "one row": (0, 1), "one value": (0, 0),
        }[layout]  # fmt: skip
        count = (rows - 1) * row + (cols - 1) * col + 1 if rows and cols else 0
        return self.memory.block(count * BYTES[dtype]), row, col

    def call(self, name: str, *arguments: Any) -> None:
        self.calls += 1
        getattr(self.module, name)(*arguments)

    def matmul(self, isa: str, dtype: int, shape: tuple[int, ...], x_in: str, w_in: str) -> None:
        M, K, N, R = shape
        x, w = self.operand(M, K, x_in, dtype), self.operand(K, N, w_in, dtype)
        (s, s_sm, _), l = self.operand(M, R, "gap", dtype), self.operand(R, N, w_in, dtype)
        bias, (y, y_sm, _) = self.memory.block(N * BYTES[dtype]), self.operand(M, N, "gap", dtype)
        panels = self.memory.block(self.module.packed_bytes(isa, dtype, K, N), aligned=True)
        for threads in (1, 2):
            self.call("pack", isa, dtype, K, N, *w, panels, threads)
            for packed, mask in itertools.product((0, panels), MASKS):
                self.call("matmul", isa, dtype, M, N, K, R, *x, *w, packed, s, s_sm, *l, bias,
                          bool(packed), *mask, y, y_sm, threads)  # fmt: skip
        self.call("matmul", isa, dtype, M, N, 0, R, 0, 0, 1, 0, 1, 0, 0, s, s_sm, *l, 0, True,
                  *MASKS[1], y, y_sm, 1)  # fmt: skip

    def skinny(self, isa: str, dtype: int, shape: tuple[int, ...], x_in: str, a_in: str) -> None:
        M, K, _, R = shape
        x, a = self.operand(M, K, x_in, dtype), self.operand(R, K, a_in, dtype)
        s, ds = (self.operand(M, R, "rows", dtype)[0] for _ in range(2))
        b = self.operand(K, R, a_in, dtype)
        for threads, out in itertools.product((1, 2), {0, dtype}):
            da = self.operand(R, K, "columns" if a_in == "columns" else "gap", out)
            db = self.operand(K, R, "columns" if a_in == "columns" else "gap", out)
            for mask in MASKS:
                self.call("shrink", isa, dtype, M, K, R, *x, *a, 0.5, *mask, s, threads)
                self.call("reduce", isa, dtype, M, K, R, ds, *x, *mask, da[0], out, *da[1:],
                          threads)  # fmt: skip
            for want_ds, want_db in ((ds, db[0]), (ds, 0), (0, db[0])):
                self.call("shrink_reduce", isa, dtype, M, K, R, *x, *b, 0.5, want_ds, s, want_db,
                          out, *db[1:], threads)  # fmt: skip

    def run(self, isas: list[str], every: int) -> int:
        """Every so many-th of all problems."""
        others = ("rows", "columns", "strided")
        problems = itertools.product(SHAPES, LAYOUTS, others, range(3), isas)
        for shape, x_in, other_in, dtype, isa in itertools.islice(problems, 0, None, every):
            self.call("keep_mask", isa, 1, 9, *shape[:2], self.memory.block(shape[0] * shape[1]))
            self.matmul(isa, dtype, shape, x_in, other_in)
            self.skinny(isa, dtype, shape, x_in, other_in)
            self.memory.free()
        return self.calls


def main(path: str, allocator: str, every: str, *isas: str) -> None:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = set(isas) - set(module.supported_isas())
    assert not missing, f"not available here: {missing}"
    print(Sweep(module, allocator).run(list(isas), int(every)), "calls")


def run_sweep(path: str, allocator: str, every: int, isas: list[str], **environment: str) -> None:
    ran = subprocess.run(
        [sys.executable, __file__, path, allocator, str(every), *isas],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stderr[-8000:]}"
    assert ran.stdout.endswith("calls\n") and "runtime error" not in ran.stderr


@pytest.fixture(scope="module")
def native() -> Any:
    from lora_fused.backends import cpu

    if not (cpu.native() and cpu.native().supported_isas()):
        pytest.skip("the native kernels are not built or cannot run")
    return cpu.native()


def test_nothing_behind_an_operand_is_touched(native: Any) -> None:
    run_sweep(native.__file__, "pages", EVERY, native.supported_isas())


def runtime_libraries(compiler: str) -> str:
    """What must be loaded before the interpreter for a sanitized module to work in it."""
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    paths = [ran.stdout.strip() for ran in found]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip(f"{compiler} comes without the sanitizers' libraries")
    return ":".join(paths)


@pytest.fixture(scope="module")
def sanitized(native: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The native module built with both sanitizers, and what to preload for it."""
    pybind11, compiler = pytest.importorskip("pybind11"), os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) and shutil.which("cmake")):
        pytest.skip("there is no compiler or no cmake")
    preload, build = runtime_libraries(compiler), tmp_path_factory.mktemp("sanitized")
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=None",
        "-DLORA_FUSED_SANITIZE=ON", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(build), "--parallel"]):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (module,) = build.glob("_C*.so")
    yield str(module), preload


@pytest.mark.full
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_sanitizers_find_nothing(native: Any, sanitized: tuple[str, str], allocator: str) -> None:
    module, preload = sanitized
    run_sweep(
        module, allocator, EVERY_FULL, native.supported_isas(), LD_PRELOAD=preload,
        # The interpreter leaks by design. A small signal stack would forbid the AMX tiles.
        ASAN_OPTIONS="detect_leaks=0:use_sigaltstack=0", UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
