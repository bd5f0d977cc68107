"""Peak memory on the CPU: what torch's allocator hands out, and what the operating system sees.

The allocator's events (torch.profiler) are exact, but miss what native code allocates for itself.
The resident peak of a fresh process sees everything, to within a page cache's noise; the memory
section reports both. Run as `python -m benchmarks.memory PROVIDER ...` it measures one provider.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.providers import (
    ALL_PROVIDERS,
    FROZEN,
    OURS,
    PEFT,
    PREPACKED,
    SMART,
    Built,
    NotServed,
)
from benchmarks.record import MemoryRecord
from benchmarks.shapes import Case, Layer
from benchmarks.tensors import make_tensors

SECTION_CASE = Case(Layer("llama-3.2-1b", "q", 2048, 2048), "bf16", 2048, 16, (0.05,))
SECTION_PROVIDERS = (FROZEN, SMART, PEFT, OURS, PREPACKED)
_NOT_SERVED = "not_served"  # what a process prints in place of a record's fields


def allocated_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(peak, end) of the bytes that torch's CPU allocator hands out during `call`.

    Counted from 0 at its start; its result is alive at its end.
    """
    with (
        _native_stderr_muted(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
        ) as profile,
    ):
        result = call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, live


def peak_and_held(built: Built) -> tuple[int, int]:
    """Bytes above the inputs and parameters: the peak of forward + backward, and what forward
    leaves alive for backward, its output included."""
    measure = allocated_on_gpu if built.x.is_cuda else allocated_bytes
    peak, _ = measure(built.forward_backward)
    _, held = measure(lambda: built.call(built.x))
    return peak, held


def allocated_on_gpu(call: Callable[[], object]) -> tuple[int, int]:
    """allocated_bytes for torch's CUDA allocator, after one call that sets libraries up."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak, live = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return peak - before, live - before


@contextmanager
def _native_stderr_muted() -> Iterator[None]:
    """The profiler's library announces every start and stop on stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def measure_in_fresh_process(
    provider: str, threads: int, case: Case = SECTION_CASE, device: str = "cpu"
) -> MemoryRecord:
    """Any provider, with fp32 adapters if it can. NotServed where it has nothing for the case."""
    command = [sys.executable, "-m", "benchmarks.memory", provider, "--threads", str(threads)]
    command += ["--m", str(case.M), "--k", str(case.layer.K), "--n", str(case.layer.N)]
    command += ["--r", str(case.R), "--dtype", case.dtype, "--dropout", str(case.dropouts[0])]
    command += ["--device", device]
    # Freed blocks go back to the system at once, so that the resident peak is the true one.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command,
        env=env,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    if _NOT_SERVED in found:
        raise NotServed(found[_NOT_SERVED])
    return MemoryRecord(**found)


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM in bytes, where the system has /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _resident_peak(call: Callable[[], object]) -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    peak = _resident("VmHWM")
    return None if before is None or peak is None else peak - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Peak memory of one provider, as one line of JSON."
    )
    parser.add_argument("provider", choices=[p.name for p in ALL_PROVIDERS])
    for size in ("threads", "m", "k", "n", "r"):
        parser.add_argument(f"--{size}", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--dropout", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    try:
        print(json.dumps(_measure(args)))
    except NotServed as reason:
        print(json.dumps({_NOT_SERVED: str(reason)}))


def _measure(args: argparse.Namespace) -> dict[str, object]:
    """The fields of a MemoryRecord."""
    provider = next(p for p in ALL_PROVIDERS if p.name == args.provider)
    layer = Layer("memory", "layer", args.k, args.n)

    def build(M: int) -> Built:
        case = Case(layer, args.dtype, M, args.r)
        adapter_dtype = torch.float32 if provider.mixed else None
        tensors = make_tensors(case, adapter_dtype=adapter_dtype, device=args.device)
        return provider.build(tensors, args.dropout)

    built = build(args.m)
    # Libraries load and set themselves up, and compilers compile, outside the measurement.
    (built if provider.compiled else build(4)).forward_backward()
    resident = _resident_peak(built.forward_backward)
    peak, held = peak_and_held(built)
    return vars(MemoryRecord(provider.name, peak, held, resident))


if __name__ == "__main__":
    main()
