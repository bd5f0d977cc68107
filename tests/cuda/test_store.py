"""What the tests compile is made once, though several processes ask for it at the same time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import compile as compiling

SOURCE = "tests/cuda/instructions.cu"


def test_one_compiles_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is on a file: it keeps threads apart as it does processes."""
    commands: list[str] = []

    def compiler(command: Sequence[object]) -> str:
        commands.append(Path(str(command[0])).name)
        time.sleep(0.2)
        Path(str(command[-1])).write_text("made")
        return "said"

    monkeypatch.setattr(compiling, "STORE", tmp_path / "store")
    monkeypatch.setattr(compiling, "_called", compiler)
    with ThreadPoolExecutor(4) as pool:
        logs = list(pool.map(lambda _: compiling.compiler_log(SOURCE, "sm_80"), range(4)))
    assert logs == ["said"] * 4 and commands == ["nvcc", "ptxas"]
    assert compiling.ptx(SOURCE, "sm_80") == "made" and len(commands) == 2


def test_machine_code_without_its_log_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ended between the two leaves such a thing."""
    monkeypatch.setattr(compiling, "STORE", tmp_path)
    file = compiling.cubin(SOURCE, "sm_80")
    file.with_suffix(".log").unlink()
    assert "registers" in compiling.compiler_log(SOURCE, "sm_80")
