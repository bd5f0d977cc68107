"""Compiles a Triton kernel for a GPU that is not there, and reads what the compilers made of it.

A failing compiler pass can take the process down, so the work is done by a child process, and its
results are kept under build/triton. The child: `python -m tests.triton.compiled`, which reads
pickled requests and answers with pickled results.
"""

from __future__ import annotations

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
from typing import Any

import lora_fused

ROOT = Path(__file__).parents[2]
KERNELS = Path(lora_fused.__file__).parent / "backends" / "triton" / "kernels"
CACHE = ROOT / "build" / "triton"


@dataclass(frozen=True)
class Request:
    """A kernel of the package, specialised as Triton's launcher would do it.

    types: by argument name, "*bf16", "i32", …, "tensordesc<bf16[64, 32]>" or "constexpr". constants:
    the values of the latter. aligned: arguments known to be multiples of 16.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    target: str
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        import triton

        text = "".join(path.read_text() for path in sorted(KERNELS.glob("*.py")))
        text += f"{triton.__version__} {self!r}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


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
    """Compile, or take the result of an earlier run."""
    file = CACHE / f"{request.kernel}-{request.target}-{request.key}.json"
    if not file.exists():
        result = _child().ask(request)
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
    from triton.compiler import ASTSource

    from lora_fused.backends.triton import launch

    fn = getattr(launch.kernels(), request.kernel)
    types, constants = dict(request.types), dict(request.constants)
    at = {name: i for i, name in enumerate(fn.arg_names)}
    source = ASTSource(
        fn,
        {name: types[name] for name in fn.arg_names},
        constexprs={(at[name],): value for name, value in constants.items()},
        attrs={(at[name],): [["tt.divisibility", 16]] for name in request.aligned},
    )
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages}
    try:
        made = triton.compile(source, target=_gpu(request.target, GPUTarget), options=options)
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    if request.target.startswith("gfx"):
        return _amd(made)
    result = _resources(made.asm["cubin"])
    result.ptx = made.asm["ptx"]
    result.shared = made.metadata.shared
    result.threads = 32 * made.metadata.num_warps
    result.descriptors = [dict(d) for d in getattr(made.metadata, "tensordesc_meta", None) or []]
    return result


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
    names = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.M))
    sass: Counter[str] = Counter()
    for name, count in names.items():
        sass[name.split(".")[0]] += count
    spills = sass["STL"] + sass["LDL"]
    return Compiled(registers=int(found[1]), stack=int(found[2]), spills=spills, sass=dict(sass))


def _output(*command: Any) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


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
