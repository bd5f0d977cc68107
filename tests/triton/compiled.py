"""Compiles a Triton kernel for a GPU that is not there, and reads what the compilers made of it.

A failing compiler pass can take the process down, so the work is done by a child process, and its
results are kept under build/triton. The child: `python -m tests.triton.compiled`, which reads
pickled requests and answers with pickled results.
"""

from __future__ import annotations

import ast
import atexit
import functools
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lora_fused

ROOT = Path(__file__).parents[2]
KERNELS = Path(lora_fused.__file__).parent / "backends" / "triton" / "kernels"
CACHE = ROOT / "build" / "triton"


class Pointer(NamedTuple):
    """A tensor argument: element type in torch's words, and whether 16 divides its address."""

    dtype: str
    aligned: bool


class Map(NamedTuple):
    """A tensor descriptor argument."""

    dtype: str
    block: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A launch of a kernel of the package, as far as the compiler sees it.

    args are the launch's arguments with tensors replaced by Pointer and Map, and numbers by one
    representative of those that Triton does not tell apart (see `emulated.seen_by_compiler`).
    """

    kernel: str
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    target: str
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{_sources(self.kernel)} {self!r}".encode()).hexdigest()[:24]


# The files of each kernel, besides those of all.
_FILES = {
    "matmul": ("matmul", "tiles"),
    "shrink": ("shrink",),
    "sum": ("shrink",),
    "reduce": ("reduce",),
}


@functools.cache
def _sources(kernel: str) -> str:
    """What decides the compiler's output besides the request."""
    import triton

    files = [KERNELS / f"{name}.py" for name in (*_FILES[kernel], "dropout")]
    code = "".join(_code(path) for path in (*files, KERNELS.parent / "arguments.py"))
    return hashlib.sha256(f"{triton.__version__} {code}".encode()).hexdigest()


def _code(path: Path) -> str:
    """A source without comments, docstrings and layout."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_docstring(s)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@dataclass
class Compiled:
    """What came out. error is the compiler's last line if it failed, and then all else is empty."""

    error: str = ""
    ptx: str = ""
    shared: int = 0
    threads: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    descriptors: list[dict[str, Any]] = field(default_factory=list)
    sass: dict[str, int] = field(default_factory=dict)


def compile_kernel(request: Request) -> Compiled:
    """Compile, or take the result of an earlier run. Failures are not kept."""
    file = CACHE / f"{request.kernel}-{request.target}-{request.key}.json"
    if not file.exists():
        result = _child().ask(request)
        if result.error:
            return result
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as out:
            json.dump(asdict(result), out)
        os.replace(out.name, file)
    return Compiled(**json.loads(file.read_text()))


class _Child:
    """The compiling process; started again after a crash."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Request) -> Compiled:
        process = self.process or self._start()
        assert process.stdin and process.stdout
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            result: Compiled = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            self.process = None
            return Compiled(error=f"the compiler ended with status {process.wait()}")
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
        )
        atexit.register(self.process.kill)
        return self.process


@functools.cache
def _child() -> _Child:
    return _Child()


def _compile(request: Request) -> Compiled:
    """In the child: compile and look at the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lora_fused.backends.triton import launch

    triton.runtime.driver.set_active(_NoDevice(_gpu(request.target, GPUTarget)))
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages}
    args = [_stand_in(arg) for arg in request.args]
    try:
        kernel = getattr(launch.kernels(), request.kernel)
        made = kernel.warmup(*args, grid=(1,), **dict(request.constants), **options)
    except Exception as error:
        return Compiled(error=_reason(error))
    if request.target.startswith("gfx"):
        return _amd(made)
    result = _resources(made.asm["cubin"])
    result.ptx = made.asm["ptx"]
    result.shared = made.metadata.shared
    result.threads = 32 * made.metadata.num_warps
    result.descriptors = [dict(d) for d in getattr(made.metadata, "tensordesc_meta", None) or []]
    return result


def _reason(error: BaseException) -> str:
    """The words of the innermost error: the outer ones quote the source around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


class _NoDevice:
    """A driver for a GPU that is not there: what Triton's launcher asks before it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"no {self.target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        return 0


class _Address:
    """A tensor that only has a dtype and an address."""

    def __init__(self, dtype: str, aligned: bool = True) -> None:
        import torch

        self.dtype = getattr(torch, dtype)
        self.address = 256 if aligned else 264

    def data_ptr(self) -> int:
        return self.address


def _stand_in(arg: Any) -> Any:
    """What Triton's launcher is given for an argument of a request."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(arg, Pointer):
        return _Address(*arg)
    if isinstance(arg, Map):
        return TensorDescriptor(_Address(arg.dtype), [1024, 1024], [1024, 1], list(arg.block))
    if isinstance(arg, tuple):
        values = [_stand_in(value) for value in arg]
        return type(arg)(*values) if hasattr(arg, "_fields") else tuple(values)
    return arg


def _gpu(target: str, GPUTarget: Any) -> Any:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _resources(cubin: bytes) -> Compiled:
    """Registers, stack and the instructions that matter, from the cubin."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    opcode = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
    names = Counter(re.findall(opcode, listing, re.M))
    sass: Counter[str] = Counter()
    for name, count in names.items():
        sass[name.split(".")[0]] += count
    spills = sass["STL"] + sass["LDL"]
    return Compiled(registers=int(found[1]), stack=int(found[2]), spills=spills, sass=dict(sass))


def _output(*command: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout


def _amd(made: Any) -> Compiled:
    """The same for AMD, from the comments of the assembly."""
    text = made.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return Compiled(
        shared=made.metadata.shared,
        threads=64 * made.metadata.num_warps,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        sass={"MFMA": len(re.findall(r"^\s+v_mfma", text, re.M))},
    )


def _serve() -> None:
    """Answer requests until the parent goes away; whatever the compiler prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_compile(request), answers)
        answers.flush()


if __name__ == "__main__":
    # Requests are unpickled under the module's real name.
    from tests.triton import compiled

    compiled._serve()
