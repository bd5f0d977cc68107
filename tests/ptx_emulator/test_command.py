"""`python -m tests.ptx_emulator FILE.ptx`, and the clocks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from . import Uninitialised
from .__main__ import main
from .harness import findings, kernel

COPY = """mul.wide.u32 %w, %t, 4; add.s64 %d1, %a0, %w; add.s64 %d2, %a1, %w;
    ld.global.b32 %r1, [%d1]; st.global.b32 [%d2], %r1;"""


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ptx_emulator", *words])
    return main()


def test_a_file_is_described_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "copy.ptx"
    file.write_text(kernel(COPY, 2))
    assert command(monkeypatch, str(file)) == 0
    assert "ld.global.b32" in capsys.readouterr().out
    run = [str(file), "--kernel", "k", "--block", "32", "--every-schedule"]
    assert command(monkeypatch, *run, "u32:32", "out:u32:32") == 0
    assert "k under serial-late-eager" in capsys.readouterr().out
    assert command(monkeypatch, *run, "u32:32", "out:u32:16") == 1
    assert "out-of-bounds" in capsys.readouterr().out


def test_clocks_go_forward() -> None:
    out = np.zeros(2, np.uint64)
    body = """mov.u64 %d1, %clock64; add.s32 %r1, %t, 1; mov.u64 %d2, %clock64;
        bar.sync 0; mov.u64 %d2, %clock64; st.global.v2.b64 [%a0], {%d1, %d2};"""
    findings(body, Uninitialised(out), threads=1).check()
    assert out[0] <= out[1]
