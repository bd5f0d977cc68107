"""Verdicts and times on disk: damaged files, other versions, processes and threads at once."""

from __future__ import annotations

import json
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_fused import (
    gpu_store,
    gpu_tuning,
)
from lora_fused.devices import DEVICES
from tests.gpu_double import Clock, config_of, forget


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "something else", "us": {}}', "\x00\xff"])
def test_damaged_and_foreign_files_are_ignored_with_one_warning(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    config_of()
    files = list(gpu_store.directory(DEVICES["H100"]).glob("*.json"))
    assert len(files) > 3
    for file in files:
        file.write_text(text)
    forget()
    runs = clock.runs
    with pytest.warns(UserWarning, match="lora_fused: ignoring") as caught:
        config = config_of()
    assert len(caught) == 1 and config.backend == "triton" and clock.runs > runs
    for file in files:
        assert "key" in json.loads(file.read_text())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("times", [{"library": "fast"}, {"triton x": 1.0}, 3, {}])
def test_an_answer_that_makes_no_sense_is_timed_again(
    times: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    config_of()
    for file in gpu_store.directory(DEVICES["H100"]).glob("timing*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "us": times}))
    forget()
    runs = clock.runs
    assert config_of().backend == "triton" and clock.runs > runs


@pytest.mark.usefixtures("gpu")
def test_answers_belong_to_a_device_and_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, a100 = DEVICES["H100"], DEVICES["A100"]
    gpu_store.remember(h100, "timing", "k", {"us": {"library": 1.0}})
    assert gpu_store.recall(h100, "timing", "k") == {"key": "k", "us": {"library": 1.0}}
    assert gpu_store.recall(a100, "timing", "k") is None
    assert gpu_store.recall(replace(h100, capability=91), "timing", "k") is None
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert gpu_store.recall(h100, "timing", "k") is None


def _store(number: int) -> None:
    for i in range(20):
        gpu_store.remember(DEVICES["H100"], "timing", f"{number} {i}", {"us": {"library": i}})
        gpu_store.remember(DEVICES["H100"], "timing", f"both {i}", {"us": {"library": i}})


@pytest.mark.usefixtures("gpu")
def test_processes_that_write_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_store, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = gpu_store.answers(DEVICES["H100"], "timing")
    assert len(found) == 3 * 20 + 20
    assert not list(gpu_store.directory(DEVICES["H100"]).glob("*.tmp"))


@pytest.mark.usefixtures("gpu")
def test_threads_that_ask_at_once_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    # A busy machine would end one of the two measurements after fewer rounds.
    monkeypatch.setattr(gpu_tuning, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    threads = [threading.Thread(target=config_of) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = clock.runs
    forget()
    for file in gpu_store.directory(DEVICES["H100"]).glob("timing*"):
        file.unlink()
    config_of()
    assert clock.runs == 2 * alone


@pytest.mark.usefixtures("gpu")
def test_a_disk_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(blocked / "sub"))
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink_matmul=0.0001))
    with pytest.warns(UserWarning, match="cannot remember"):
        config = config_of()
    assert config.backend == "triton"
