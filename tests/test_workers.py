"""How `make test` takes the machine: worker processes, and the threads of each."""

from __future__ import annotations

import os

import pytest

from tests import conftest

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cores", "memory", "workers"),
    [(2, 24 * GIB, 2), (16, 24 * GIB, 8), (4, 7 * GIB, 2), (8, 2 * GIB, 1), (1, 64 * GIB, 1)],
)
def test_a_worker_for_every_core_as_far_as_the_memory_goes(
    cores: int, memory: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(conftest, "cores", lambda: cores)
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert conftest.pytest_xdist_auto_num_workers() == workers


@pytest.mark.parametrize(("workers", "threads"), [(2, "4"), (8, "1"), (16, "1")])
def test_the_workers_share_the_cores(
    workers: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # restored afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")
    conftest.pytest_xdist_setupnodes([object()] * workers)
    assert os.environ["OMP_NUM_THREADS"] == threads
    conftest.pytest_xdist_setupnodes([object()])
    assert os.environ["OMP_NUM_THREADS"] == threads, "what is set stays"
