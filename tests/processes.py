"""A world of gloo processes on this machine, which the tests hand functions to run on every rank.

    def job(rank: int, size: int) -> float: ...     # at the top level of a module
    results = world.run(job, *args)                 # [job(*args) on rank 0, on rank 1, …]

The processes live on between tests, so that torch is imported once. A failing or hanging job
ends the world; the next run starts another.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_COLLECTIVE_TIMEOUT = timedelta(seconds=60)
_JOB_TIMEOUT = 150.0


class JobFailed(AssertionError):
    """A job raised on some rank; the message holds the tracebacks."""


class World:
    """`size` processes, started at the first run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[tuple[Any, Connection]] = []

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of job(*args) by rank. Raises JobFailed where one raises or hangs."""
        if not self._members:
            self._start()
        for _, connection in self._members:
            connection.send((job, args))
        answers = [self._answer(rank) for rank in range(self.size)]
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.stop()
            raise JobFailed("\n".join(failures))
        return [result for _, result in answers]

    def stop(self) -> None:
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join()
        self._members = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor.parallel", "lora_fused"])
        meeting = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, meeting, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def _answer(self, rank: int) -> tuple[bool, Any]:
        connection = self._members[rank][1]
        if not connection.poll(_JOB_TIMEOUT):
            return False, f"no answer within {_JOB_TIMEOUT:.0f} s"
        try:
            return connection.recv()
        except EOFError:
            return False, "the process died"


def _serve(rank: int, size: int, meeting: Path, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting}", timeout=_COLLECTIVE_TIMEOUT, rank=rank, world_size=size
    )
    while True:
        try:
            job, args = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            connection.send((True, job(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
