"""Fixtures shared by the tests: every path a call can take through the library."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from lora_fused import autotune, dispatch
from lora_fused.backends import cpu
from lora_fused.config import Config, Problem
from tests.gpu_double import pretended_gpu
from tests.processes import World

# NOTE: inductor's cache outlives a checkout and does not know what an operator of ours returns.
_INDUCTOR = pathlib.Path(__file__).parents[1] / "build" / "inductor"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_INDUCTOR))

WORKER_MEMORY = 3 << 30  # bytes


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker process for every core, as far as the memory goes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores(), memory // WORKER_MEMORY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[object]) -> None:
    """The workers, and what they start, share the cores; a test that needs threads sets them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // len(specs))))


def pytest_collection_finish() -> None:
    """Fewer walks through the heap, and none of them through what has been imported.

    The emulator makes tens of thousands of objects for a launch; of the time of a small one the
    garbage collector took three quarters.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 5, 5)


class Path(NamedTuple):
    """A backend and, for the native one, the strategy and the instruction set that are forced."""

    backend: str
    strategy: str = ""
    isa: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in self if part)


def native_isas() -> list[str]:
    """The instruction sets that this machine runs; empty without the native module."""
    module = cpu.native()
    return module.supported_isas() if module else []


TORCH = Path("torch")
OWN = [Path("cpu", "own", isa) for isa in native_isas()]
OTHERS = [
    Path("cpu", strategy, isa) for isa in native_isas()[-1:] for strategy in ("hybrid", "library")
]
ALL_PATHS = [TORCH, *OWN, *OTHERS]


@pytest.fixture(params=ALL_PATHS, ids=str)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every path: torch, the native kernels of every instruction set, and the mixed strategies."""
    yield from forced(request.param, monkeypatch)


@pytest.fixture(params=OWN or [TORCH], ids=str)
def own_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The native kernels of every instruction set; torch where there are none."""
    yield from forced(request.param, monkeypatch)


@pytest.fixture(params=[TORCH, *OWN[-1:]], ids=str)
def main_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torch, and the native kernels of the best instruction set."""
    yield from forced(request.param, monkeypatch)


def forced(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Force a path for the duration of a test."""
    if path.backend == "cpu":
        monkeypatch.setenv("LORA_FUSED_CPU_ISA", path.isa)

        def choose_cpu(problem: Problem, info: cpu.CpuInfo) -> Config:
            assert info.isa == path.isa
            own = "packed" if problem.prepacked else "own"
            strategy = own if path.strategy == "own" else path.strategy
            return Config("cpu", strategy, strategy, path.isa, problem.threads)

        monkeypatch.setattr(dispatch, "choose_cpu", choose_cpu)
    dispatch.forget_choices()
    yield path
    monkeypatch.undo()
    dispatch.forget_choices()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Two gloo processes."""
    world = World(2)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def world4() -> Iterator[World]:
    """Four gloo processes."""
    world = World(4)
    yield world
    world.stop()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """A GPU that is not there, with nothing remembered on disk."""
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(tmp_path))
    with pretended_gpu():
        yield


@pytest.fixture(autouse=True)
def clean_state(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fixed seeds, no user settings, and no timing cache outside the test."""
    for name in ("LORA_FUSED_BACKEND", "LORA_FUSED_CPU_ISA", "LORA_FUSED_VERBOSE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "timings"))
    torch.manual_seed(0)
    dispatch.forget_choices()
    autotune.forget()
    yield
    dispatch.forget_choices()
    autotune.forget()
