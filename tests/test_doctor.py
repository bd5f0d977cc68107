"""`python -m lora_fused doctor`: what it finds, without a GPU and with a pretended one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_fused import doctor, gpu_tuning, selfcheck
from lora_fused.devices import DEVICES
from tests import fake_backend
from tests.gpu_double import Clock, pretended_gpu

H100 = DEVICES["H100"]


def test_a_machine_without_a_gpu_says_so_and_checks_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_fused", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch sees no GPU" in done.stdout
    assert "layers on cpu, backend auto" in done.stdout and "wrong" not in done.stdout
    assert done.stdout.rstrip().endswith("everything that was checked is right")


def test_other_commands_are_refused() -> None:
    for words, code in (([], 0), (["--help"], 0), (["surgeon"], 2), (["doctor", "--fast"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "lora_fused", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code and "doctor" in done.stdout


def test_wrong_numbers_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_fused.backends import torch_ops

    original = torch_ops.reduce
    monkeypatch.setattr(torch_ops, "reduce", lambda *args: original(*args) * 1.01)
    assert doctor.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "wrong" in out and "da: max error" in out


def test_the_ladder_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink_matmul=0.0001))
    here = torch.device("cpu")
    with pretended_gpu():
        kernels = doctor.kernels_of(H100)
        parts = {(kernel.part, kernel.strategy) for kernel in kernels}
        assert {("forward", "s_first"), ("dx", "decode"), ("reduce", "reduce")} <= parts
        assert ("shrink", "shrink") in parts

        def broken(*args: object) -> None:
            raise RuntimeError("misaligned address\nand a backtrace")

        original = fake_backend.reduce_pair
        monkeypatch.setattr(fake_backend, "reduce_pair", broken)
        with pytest.warns(UserWarning, match="misaligned address"):
            findings = doctor._kernels_on(H100, here)
        assert findings.failures == sum(kernel.part == "reduce" for kernel in kernels)
        assert doctor._demoted(H100).rows[0][1:] == (
            "demoted",
            "RuntimeError: misaligned address",
        )
        monkeypatch.setattr(fake_backend, "reduce_pair", original)
    with pretended_gpu():
        reduce = next(kernel for kernel in kernels if kernel.part == "reduce")
        assert selfcheck.verdict(reduce, here) == "RuntimeError: misaligned address"
        assert doctor._kernels_on(H100, here).failures == 0, "mended: the doctor checks again"
        assert selfcheck.verdict(reduce, here) == ""
        monkeypatch.setattr(doctor, "_TOKENS", (1, 128))  # the CPU computes what is timed
        choices = doctor._choices(H100, here)
        assert choices.failures == 0
        assert all("measured" in detail and "modelled" in detail for _, _, detail in choices.rows)
        doctor.show(choices)
        assert "choices on H100" in capsys.readouterr().out
