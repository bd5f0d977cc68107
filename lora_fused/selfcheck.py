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
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused import backends, gpu_store
from lora_fused.autograd import Saved, lora_backward, lora_forward
from lora_fused.config import Call, Mask, Problem, Route, Tiles
from lora_fused.devices import Device
from lora_fused.gpu_choice import Option, part_config
from lora_fused.reference import dropout_threshold, effective_scaling
from lora_fused.testing import Case, assert_close_to_ref, make_case

_DROPOUT = 0.3
_PATIENCE_SECONDS = 600.0  # for a check that another process is running
_OUTPUTS = {
    "forward": ("y", "s"),
    "dx": ("dx",),
    "reduce": ("da", "db"),
    "shrink": ("s", "da"),
}

_lock = threading.RLock()
_verdicts: dict[Kernel, str] = {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is checked, and demoted, as one: part is "forward", "dx", "reduce" or "shrink"."""

    device: Device
    backend: str
    part: str
    strategy: str
    tiles: Tiles
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.backend} {self.part} {self.strategy} {dtype} {self.tiles}"


def kernels_of(problem: Problem, option: Option) -> list[Kernel]:
    """The kernels that an option launches."""
    if option.tiles is None or problem.device is None:
        return []
    found = [
        Kernel(
            problem.device, option.backend, option.part, option.strategy, option.tiles,
            problem.dtype,
        )
    ]  # fmt: skip
    if option.shrink_tiles is not None:
        found.append(shrink_kernel(problem, option.backend, option.shrink_tiles))
    return found


def shrink_kernel(problem: Problem, backend: str, tiles: Tiles) -> Kernel:
    """The kernel that makes s and ds in a launch of its own."""
    assert problem.device is not None
    return Kernel(problem.device, backend, "shrink", "shrink", tiles, problem.dtype)


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


def run_check(kernel: Kernel, where: torch.device) -> str:
    """Compare with the reference, with and without dropout and bias; "" or what was wrong."""
    for dropout_p, bias in ((0.0, True), (_DROPOUT, False)):
        case = _small_case(kernel, dropout_p, bias)
        problem = _problem_of(case, kernel, where)
        module = backends.load(kernel.backend)
        if module is None:
            return backends.why_missing(kernel.backend)
        if module.not_supported_reasons(problem):
            continue
        try:
            got = _outputs(kernel, case, problem, where)
            truth, baseline = case.truth(), case.baseline()
            for name in _OUTPUTS[kernel.part]:
                assert_close_to_ref(name, got[name].cpu(), truth[name], baseline[name])
        except AssertionError as error:
            return f"wrong result, {error}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return ""


def _small_case(kernel: Kernel, dropout_p: float, bias: bool) -> Case:
    """Ragged, and larger than one tile each way; rows at multiples of 16 bytes."""
    tiles = kernel.tiles
    M = 11 if kernel.strategy == "decode" else 2 * (tiles.block_m or 64) + 5
    N = (tiles.block_n or 128) + 24
    K = 3 * (tiles.block_k or 64) + 40
    if kernel.part == "dx":
        N, K = K, N
    R = 16 if dropout_p else min(tiles.block_r or 16, 64)
    return make_case(M, K, N, R, kernel.dtype, bias=bias, dropout_p=dropout_p)


def _problem_of(case: Case, kernel: Kernel, where: torch.device) -> Problem:
    (M, K), (N, R) = case.x.shape, case.lora_B.shape
    return Problem(
        M, K, N, R, kernel.dtype, where.type, kernel.dtype, case.bias is not None,
        case.dropout_p > 0, frozenset({"x", "lora_A", "lora_B"}), device=kernel.device,
    )  # fmt: skip


def _outputs(
    kernel: Kernel, case: Case, problem: Problem, where: torch.device
) -> dict[str, Tensor]:
    """What the kernel computes of the case; what surrounds it is torch's."""
    x, weight, lora_A, lora_B, dy = (
        t.to(where) for t in (case.x, case.weight, case.lora_A, case.lora_B, case.dy)
    )
    bias = None if case.bias is None else case.bias.to(where)
    mask, scale = None, case.scaling
    if case.dropout_p > 0:
        seed = torch.full((), case.seed, dtype=torch.int64, device=where)
        mask = Mask(case.seed if where.type == "cpu" else seed, dropout_threshold(case.dropout_p))
        scale = effective_scaling(scale, case.dropout_p)
    with torch.no_grad():
        call = Call(_route(kernel, problem, frozenset()), scale, mask)
        y, s = lora_forward(call, x, weight, lora_A, lora_B, bias)
        needs = {"dx": {"x"}, "reduce": {"lora_A", "lora_B"}, "shrink": {"lora_A"}}
        wanted = frozenset(needs.get(kernel.part, ()))
        call = Call(_route(kernel, problem, wanted), scale, mask)
        gradients = lora_backward(call, dy, Saved(x, s, weight, lora_A, lora_B))
    found = {"y": y, "s": s, **gradients._asdict()}
    return {name: t for name, t in found.items() if t is not None}


def _route(kernel: Kernel, problem: Problem, needs: frozenset[str]) -> Route:
    config = part_config(kernel.part, kernel.backend, kernel.strategy, kernel.tiles)
    dtypes = (kernel.dtype,) * 4
    x_shape, y_shape = (problem.M, problem.K), (problem.M, problem.N)
    return Route(problem, config, kernel.dtype, False, needs, x_shape, y_shape, dtypes)
