"""Compiles CUDA sources for tests: PTX to execute in the emulator, cubins to measure.

    text = ptx("csrc/cuda/reduce.cu", "sm_80")                    # what the emulator runs
    resources("csrc/cuda/reduce.cu", "sm_90a")["lora_reduce..."]  # registers, spills, shared bytes
    sass("csrc/cuda/reduce.cu", "sm_90a")["lora_reduce..."]       # machine code as text
    launch(text, "lora_reduce...", grid, block, args, shared=...)  # in the emulator

Results are kept under build/cuda-tests, named by a hash of the source with everything it includes
from this repository, the flags and the compiler's version. Needs nvcc but no GPU; see `toolkit`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from tests.ptx_emulator import Report, Struct, Uninitialised, parse, run
from tests.ptx_emulator.syntax import Module
from tests.ptx_emulator.testing import bits

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "build" / "cuda-tests"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}")
Defines = Mapping[str, object]


class CompilerMissing(RuntimeError):
    """No CUDA compiler on this machine."""


class CompilationFailed(RuntimeError):
    """nvcc, ptxas or a disassembler returned an error; the message is theirs."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    ptxas: Path
    version: str


@dataclass(frozen=True)
class Resources:
    """What ptxas says about one kernel."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_bytes: int  # static


@cache
def toolkit() -> Toolkit:
    """nvcc on PATH, in CUDA_HOME or from PyPI's wheels. Raises CompilerMissing."""
    for nvcc in _compilers():
        ptxas = shutil.which("ptxas", path=str(nvcc.parent)) or shutil.which("ptxas")
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"V([\d.]+)", answer.stdout)
        if version and ptxas:
            return Toolkit(nvcc, Path(ptxas), version[1])
    raise CompilerMissing("no nvcc on PATH, in CUDA_HOME or from pip (nvidia-cuda-nvcc)")


def _compilers() -> list[Path]:
    """Candidates; a wrapper script on PATH is followed by the toolkit it may stand for."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvcc"))
    found = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found += [Path("/usr/local/cuda/bin/nvcc"), *wheels]
    on_path = shutil.which("nvcc")
    return [*([Path(on_path)] if on_path else []), *(path for path in found if path.is_file())]


# ---- compiled results ----------------------------------------------------------------------------


def ptx(source: str | Path, arch: str, defines: Defines | None = None) -> str:
    """The PTX of a source (relative to the repository) for a target such as "sm_80"."""
    return _ptx_file(source, arch, defines).read_text()


def cubin(source: str | Path, arch: str, defines: Defines | None = None) -> Path:
    """Machine code; beside it lies what ptxas said, with the ending .log."""
    text = _ptx_file(source, arch, defines)
    target, log = text.with_suffix(".cubin"), text.with_suffix(".log")
    with _alone(target):
        if not log.exists():
            command = [toolkit().ptxas, f"-arch={arch}", "-O3", "-v", "--generate-line-info", text]
            log.write_text(_made(command, target))
    return target


def compiler_log(source: str | Path, arch: str, defines: Defines | None = None) -> str:
    """Everything that ptxas printed, warnings included."""
    return cubin(source, arch, defines).with_suffix(".log").read_text()


def resources(
    source: str | Path, arch: str, defines: Defines | None = None
) -> dict[str, Resources]:
    """Registers, spills and static shared memory of every kernel of a source."""
    log = compiler_log(source, arch, defines)
    found = {}
    for name, text in re.findall(
        r"Compiling entry function '([^']+)'(.*?)(?=Compiling entry|\Z)", log, re.S
    ):

        def number(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            stack=number(r"(\d+) bytes stack frame"),
            shared_bytes=number(r"(\d+) bytes smem"),
        )
    return found


def sass(source: str | Path, arch: str, defines: Defines | None = None) -> dict[str, str]:
    """Machine code as text, by kernel, from the disassembler in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return _disassembled(tool, cubin(source, arch, defines))


@lru_cache(maxsize=1)
def _disassembled(tool: Path, file: Path) -> dict[str, str]:
    text = _called([tool, "-c", file])
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _ptx_file(source: str | Path, arch: str, defines: Defines | None) -> Path:
    path = ROOT / source
    macros = tuple(f"-D{name}={value}" for name, value in sorted((defines or {}).items()))
    flags = (*FLAGS, f"-arch={arch}", *macros)
    key = hashlib.sha256("\0".join([toolkit().version, *flags]).encode())
    for file in _included(path):
        key.update(file.read_bytes())
    target = STORE / f"{path.stem}-{arch}-{key.hexdigest()[:16]}.ptx"
    with _alone(target):
        if not target.exists():
            _made([toolkit().nvcc, *flags, "-ptx", path], target)
    return target


def _included(source: Path) -> list[Path]:
    """The source and, depth first, what it includes with quotes from csrc/."""
    seen: list[Path] = []

    def visit(file: Path) -> None:
        if file in seen:
            return
        seen.append(file)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.M):
            for folder in (file.parent, ROOT / "csrc", ROOT / "csrc" / "cuda"):
                if (folder / name).is_file():
                    visit((folder / name).resolve())
                    break

    visit(source.resolve())
    return seen


def _alone(target: Path) -> FileLock:
    """Of test processes side by side one makes a file, and the others wait for it."""
    STORE.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{target}.lock")


def _made(command: Sequence[object], target: Path) -> str:
    """Run a compiler with `-o` and move its result into place in one step."""
    with tempfile.TemporaryDirectory(dir=STORE) as folder:
        made = Path(folder) / target.name
        output = _called([*command, "-o", made])
        made.replace(target)
    return output


def _called(command: Sequence[object]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilationFailed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# ---- execution -----------------------------------------------------------------------------------


@cache
def _module(text: str) -> Module:
    return parse(text)


def launch(text: str, kernel: str, grid, block, args: Sequence, **options) -> Report:
    """Run a kernel in the emulator; for the options see `tests.ptx_emulator.run`.

    Arguments may also be contiguous torch tensors, inside a Struct or Uninitialised too; the kernel
    writes into them."""
    known: dict[int, object] = {}
    return run(_module(text), kernel, grid, block, [_buffer(a, known) for a in args], **options)


def _buffer(argument, known: dict[int, object]):
    """Tensors become numpy views; one tensor used twice stays one buffer."""
    if isinstance(argument, Struct):
        return Struct(*(_buffer(field, known) for field in argument.fields))
    if isinstance(argument, Uninitialised):
        return Uninitialised(_buffer(argument.array, known))
    if isinstance(argument, torch.Tensor):
        return known.setdefault(argument.data_ptr(), bits(argument))
    return argument
