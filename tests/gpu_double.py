"""CPU tensors that the dispatcher takes for tensors on a GPU, and a clock that tests can set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from lora_fused import backends, dispatch, gpu_choice, gpu_tuning, request, selfcheck
from lora_fused.config import Config, Problem
from lora_fused.devices import DEVICES
from lora_fused.testing import check_case, make_case
from tests import fake_backend

NEEDS = frozenset({"x", "lora_A", "lora_B"})
PROBLEM = Problem(8192, 4096, 4096, 16, torch.bfloat16, "cuda", needs=NEEDS, device=DEVICES["H100"])


@contextmanager
def pretended_gpu(device: str = "H100", names: tuple[str, ...] = ("triton",)) -> Iterator[None]:
    """While it lasts every CPU tensor is on this GPU, and the fake backend has these names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "gpu_of", lambda x: DEVICES[device])
        for name in ("cuda", "triton"):
            if name in names:
                patch.setitem(backends.BACKENDS, name, sys.modules["tests.fake_backend"])
            else:
                patch.delitem(backends.BACKENDS, name, raising=False)
                patch.setitem(backends._missing, name, "left out by the test")
        forget()
        fake_backend.calls.clear()
        yield
    forget()


def run(M: int = 24, dropout_p: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Forward and backward of a layer, held against the reference."""
    check_case(make_case(M, 64, 48, 16, dtype, bias=True, dropout_p=dropout_p))


def config_of(M: int = 24) -> Config:
    """What the dispatcher chooses for that layer."""
    case = make_case(M, 64, 48, 16, torch.bfloat16)
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    return dispatch.route_for(*tensors, None, False, "auto").config


def forget() -> None:
    """Drop everything that this process remembers; what is on disk stays."""
    dispatch.forget_choices()
    gpu_choice.options.cache_clear()
    gpu_tuning.forget()
    selfcheck.forget()


class Clock:
    """A stopwatch that runs the call and answers what the test says, by the backend's operations.

    seconds maps words to times: the first that occurs in what the call did counts, else `other`.
    """

    def __init__(self, other: float, **seconds: float) -> None:
        self.other, self.seconds, self.runs = other, seconds, 0

    def __call__(self, where: object) -> Callable[[Callable[[], object]], float]:
        return self.time

    def time(self, run: Callable[[], object]) -> float:
        """The time of one call."""
        self.runs += 1
        before = len(fake_backend.calls)
        run()
        did = " ".join(fake_backend.calls[before:])
        return next((time for word, time in self.seconds.items() if word in did), self.other)
