"""Processes: forked children compute, and OpenMP's threads are shared with torch, none too many."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.native import ISAS, matmul, needs_native, normal, shrink

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks"),
]


class Problem:
    """Something that needs several threads, computed without torch's own parallel operations."""

    def __init__(self) -> None:
        self.x, self.w = normal(64, 256, torch.float32, 1), normal(256, 256, torch.float32, 2)
        self.a = normal(8, 256, torch.float32, 3)

    def compute(self) -> Tensor:
        y = matmul(ISAS[-1], self.x, self.w, threads=2)
        s = shrink(ISAS[-1], self.x, self.a, threads=2)
        return torch.cat((y, s), 1)


def exit_status(child: int, seconds: float) -> int | None:
    """The exit status of a child; None if it hangs, and then it is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same_bits() -> None:
    """OpenMP's workers do not survive a fork: a child that waits for them would hang."""
    problem = Problem()
    expected = problem.compute()
    for _ in range(2):
        child = os.fork()
        if child == 0:
            # torch's own parallel loops, which the checks use, would hang in a forked child, as in
            # any DataLoader worker that did not do this. The calls under test ask for two threads.
            torch.set_num_threads(1)
            same = all(torch.equal(problem.compute(), expected) for _ in range(3))
            os._exit(0 if same else 1)
        assert exit_status(child, 20) == 0
    assert torch.equal(problem.compute(), expected)


class Computed(Dataset[Tensor]):
    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return self.problem.compute()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_workers_compute_the_same_bits() -> None:
    problem = Problem()
    expected = problem.compute()
    loader = DataLoader(
        Computed(problem), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    for batch in loader:
        assert all(torch.equal(got, expected) for got in batch)


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


SETUP = """
    import ctypes, os, re, sys
    import torch
    from tests.native import ISAS, module, raw_matmul

    x, w = torch.randn(64, 512), torch.randn(512, 512)

    def product(threads):
        # The threads are counted right after it: a smaller OpenMP region ends surplus ones.
        y = torch.empty(64, 512)
        raw_matmul(ISAS[-1], x, w, None, None, y, threads=threads)
        return y, tasks()

    def tasks():
        return len(os.listdir("/proc/self/task"))

    def openmp():
        with open("/proc/self/maps") as maps:
            return sorted({line.split()[-1] for line in maps if re.search("lib[gi]?omp", line)})
"""


def test_one_openmp_runtime_is_shared_with_torch() -> None:
    """A second runtime would bring a second pool, blind to torch's parallel regions."""
    libraries = run_python(SETUP + "\n    assert module()\n    print(*openmp(), sep='\\n')").split()
    assert len(libraries) == 1, libraries
    assert re.search("gomp|iomp|libomp", libraries[0])


def test_threads_are_those_of_torch() -> None:
    """After a torch operation on 4 threads, a call on 4 threads starts no further ones."""
    counts = run_python(
        SETUP
        + """
    torch.set_num_threads(4)
    first = tasks()
    torch.randn(1 << 22).exp_()
    torch_alone = tasks()
    print(first, torch_alone, product(threads=4)[1])
    """,
        OMP_NUM_THREADS="4",
    )
    first, torch_alone, both = map(int, counts.split())
    assert torch_alone >= first + 3, "torch did not start its threads: this shows nothing"
    assert both == torch_alone


def test_inside_a_parallel_region_a_call_starts_no_threads() -> None:
    """What torch's at::parallel_for is: an OpenMP region, here one entered by hand."""
    counts = run_python(
        SETUP
        + """
    (library,) = openmp()
    runtime = ctypes.CDLL(library)
    inside = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        before = tasks()
        y, after = product(threads=6)
        inside.append((runtime.omp_in_parallel(), after - before, torch.equal(y, expected)))

    expected, _ = product(threads=1)
    runtime.GOMP_parallel(body, None, 2, 0)
    assert len(inside) == 2, inside
    for in_parallel, started, same in inside:
        assert in_parallel and started == 0 and same, inside
    before = tasks()
    print(product(threads=6)[1] - before)
    """,
        OMP_NUM_THREADS="1",  # torch starts none of its own, which would be counted
    )
    assert int(counts) == 4, "outside of a region the pool grows from 2 threads to 6"


NO_MEMORY_IN_A_WORKER = """
    import re, resource
    from pathlib import Path

    import torch
    from tests.native import ISAS, normal, shrink

    x, a = normal(40, 1 << 18, torch.float32, 1), normal(8, 1 << 18, torch.float32, 2)
    expected = shrink(ISAS[-1], x, a, threads=1)  # the caller has all the scratch it needs
    shrink(ISAS[-1], x[:, :64], a[:, :64], threads=2)  # the worker exists
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        shrink(ISAS[-1], x, a, threads=2)
        message = "it had enough memory"
    except MemoryError:
        message = "MemoryError"
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert torch.equal(shrink(ISAS[-1], x, a, threads=2), expected)
    print(message)
"""


def test_a_worker_without_memory_raises_memory_error() -> None:
    """An exception that left an OpenMP region would end the process; a thread that left early would
    leave the others waiting at a barrier."""
    assert run_python(NO_MEMORY_IN_A_WORKER).strip() == "MemoryError"
