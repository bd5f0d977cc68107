"""Each GPU kernel is compared with plain torch on a small problem before its first use.

Once per device and kernel: the verdict is kept in memory and on disk. A kernel whose numbers are
wrong, that does not compile or does not launch is demoted on this device, with one warning, and the
dispatcher goes on without it. A check that never came back (the process hung or died in it) leaves
a mark that counts as a failure in later processes.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import warnings
from dataclasses import replace

import torch

from lora_fused import gpu_store
from lora_fused.config import Problem, Tiles
from lora_fused.gpu_choice import Option
from lora_fused.small_check import Kernel, run_check

_PATIENCE_SECONDS = 600.0  # for a check that another process is running
_lock = threading.RLock()
_verdicts: dict[Kernel, str] = {}


def kernels_of(problem: Problem, option: Option) -> list[Kernel]:
    """The kernels that an option launches."""
    if option.tiles is None or problem.device is None:
        return []
    found = [_kernel(problem, option.backend, option.part, option.strategy, option.tiles)]
    if option.shrink_tiles is not None:
        found.append(shrink_kernel(problem, option.backend, option.shrink_tiles))
    return found


def shrink_kernel(problem: Problem, backend: str, tiles: Tiles) -> Kernel:
    """The kernel that makes s and ds in a launch of its own."""
    return _kernel(problem, backend, "shrink", "shrink", tiles)


def _kernel(problem: Problem, backend: str, part: str, strategy: str, tiles: Tiles) -> Kernel:
    """The kernel without what is only an argument of it: into how many parts the work is cut."""
    assert problem.device is not None
    tiles = replace(tiles, splits=min(tiles.splits, 2), shrink_group=min(tiles.shrink_group, 2))
    tiles = replace(tiles, reduce_parts=min(tiles.reduce_parts, 2))
    return Kernel(
        problem.device, backend, part, strategy, tiles, problem.dtype, bool(problem.group)
    )


def verdict(kernel: Kernel, where: torch.device, may_run: bool = True) -> str | None:
    """ "" for a kernel that is right, the reason against one that is not.

    None: not checked yet, and may_run is False.
    """
    known = _verdicts.get(kernel)
    if known is not None:
        return known
    with _lock:
        known = _stored(kernel)
        if known is None and may_run:
            known = _check(kernel, where)
        if known is not None:
            _verdicts[kernel] = known
    return known


def check_again(kernel: Kernel, where: torch.device) -> str:
    """Check now, whatever was known; the new verdict replaces the old one. As `verdict`."""
    with _lock:
        _verdicts[kernel] = _check(kernel, where)
        return _verdicts[kernel]


def forget() -> None:
    """Forget what this process knows, so that the files are read again."""
    with _lock:
        _verdicts.clear()


def _stored(kernel: Kernel) -> str | None:
    answer = gpu_store.recall(kernel.device, "check", str(kernel))
    if answer is None:
        return None
    state, why = answer.get("state"), str(answer.get("why", ""))
    if state == "passed":
        return ""
    if state == "failed":
        return why or "its check failed"
    if state == "running" and not _may_be_alive(answer):
        return "its check never came back"
    return None


def _may_be_alive(answer: dict[str, object]) -> bool:
    """Whether the process that runs the check can still be at it."""
    pid, began = answer.get("pid"), answer.get("began")
    if not isinstance(pid, int) or not isinstance(began, float):
        return False
    if time.time() - began > _PATIENCE_SECONDS:
        return False
    if answer.get("host") != platform.node() or pid == os.getpid():
        return pid != os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check(kernel: Kernel, where: torch.device) -> str:
    running = {"pid": os.getpid(), "host": platform.node(), "began": time.time()}
    gpu_store.remember(kernel.device, "check", str(kernel), {"state": "running", **running})
    why = run_check(kernel, where)
    state = "failed" if why else "passed"
    gpu_store.remember(kernel.device, "check", str(kernel), {"state": state, "why": why})
    if why:
        warnings.warn(
            f"lora_fused: {kernel} is not used on {kernel.device.name}: {why}. Other kernels or "
            "torch's take its place; `python -m lora_fused doctor` shows all checks.",
            stacklevel=2,
        )
    return why
