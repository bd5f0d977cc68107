"""Timing two ways of doing the same thing once, and remembering the winner on disk.

    best(key, {"own": f, "library": g}, default="library") -> "own" or "library"

The first call for a key times the candidates for 0.1 s at most (plus one warm-up call of each);
later calls, and later processes, look the answer up. Each answer is one small file, named after
the key, in a directory for this CPU, this torch and this lora_fused, under LORA_FUSED_CACHE_DIR
(default: the user's cache directory); processes that write at the same time cannot lose each
other's answers. LORA_FUSED_AUTOTUNE=0 switches timing and look-up off; so do
torch.use_deterministic_algorithms(True), because a timing may fall out differently in each
process, and torch.compile, because a trace must not measure.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

BUDGET_SECONDS = 0.1  # forward and dx of a bucket: 0.2 s
_MAX_ROUNDS = 20

_lock = threading.RLock()
_known: dict[Path, str] = {}


def enabled() -> bool:
    """Whether best() may time, or answer from an earlier timing, right now."""
    return (
        os.environ.get("LORA_FUSED_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.compiler.is_compiling()
    )


def bucket(size: int) -> int:
    """The power of two at or above size: sizes in between share one timing."""
    return 1 << max(0, size - 1).bit_length()


def best(key: str, candidates: dict[str, Callable[[], object]], default: str) -> str:
    """The name of the fastest candidate for this key; `default` where timing is off.

    The candidates must have no effect but the time they take; they are called a few times each, in
    turns, and not at all when the answer is known. A candidate that raises has lost. Thread-safe:
    of several threads asking at once, one measures and the others wait.
    """
    if not enabled():
        return default
    path = cache_directory() / f"{file_name(key)}.txt"
    with _lock:
        answer = _known.get(path) or _read(path, candidates)
        if answer not in candidates:
            answer = _fastest(candidates, default)
            write_text(path, answer)
        _known[path] = answer
        return answer


def cache_directory() -> Path:
    """Where the answers for this CPU, this thread count, this torch and this lora_fused live."""
    from lora_fused import __version__
    from lora_fused.backends import cpu

    machine = f"{cpu.info().brand}-{cpu.isa()}" if cpu.isa() else "no-native-kernels"
    versions = f"torch{torch.__version__}-lora_fused{__version__}"
    return cache_root() / file_name(f"{machine}-{torch.get_num_threads()}threads-{versions}")


def cache_root() -> Path:
    """LORA_FUSED_CACHE_DIR, or the user's cache directory."""
    root = os.environ.get("LORA_FUSED_CACHE_DIR")
    if not root:
        import platformdirs

        root = platformdirs.user_cache_dir("lora_fused", appauthor=False)
    return Path(root)


def forget() -> None:
    """Forget what this process has read, so that the files are read again."""
    with _lock:
        _known.clear()


def file_name(text: str) -> str:
    """The text with everything replaced that a file system might not like."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)


def _fastest(candidates: dict[str, Callable[[], object]], default: str) -> str:
    """A warm-up call each, then rounds of all until the budget is spent; the least time wins."""
    deadline = time.perf_counter() + BUDGET_SECONDS
    times = {}
    for name, run in candidates.items():
        try:
            times[name] = _seconds(run)
        except Exception as error:  # a candidate that cannot run has lost, and is named
            warnings.warn(f"lora_fused: {name} failed when it was timed: {error}", stacklevel=3)
    for _ in range(_MAX_ROUNDS):
        for name in times:
            if time.perf_counter() + times[name] > deadline:
                return min(times, key=times.__getitem__)
            times[name] = min(times[name], _seconds(candidates[name]))
    return min(times, key=times.__getitem__, default=default)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _read(path: Path, candidates: dict[str, Callable[[], object]]) -> str | None:
    """The stored answer, or None. A foreign or damaged file is ignored, with a warning."""
    try:
        answer = path.read_text(encoding="ascii").strip()
        if answer in candidates:
            return answer
        problem = f"it says {answer[:40]!r}, expected one of {', '.join(candidates)}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = str(error)
    warnings.warn(f"lora_fused: ignoring the timing in {path}: {problem}", stacklevel=3)
    return None


def write_text(path: Path, answer: str) -> None:
    """Write beside and replace, so that a reader never sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(answer)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"lora_fused: cannot remember a timing: {error}", stacklevel=3)
