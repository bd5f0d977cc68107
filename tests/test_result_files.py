"""Result files and the commands that read them: documented, and refused in a sentence."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from benchmarks import record
from benchmarks.__main__ import parse
from benchmarks.claims import suite as claims
from benchmarks.claims.claim import Claim
from benchmarks.record import MemoryRecord, Record, Results, SuiteRecord

ROOT = Path(record.__file__).parent.parent


def test_the_schema_is_documented() -> None:
    text = (ROOT / "benchmarks" / "schema.md").read_text()
    words = set(re.findall(r"`(\w+)`", text))
    for cls in (Results, Record, SuiteRecord, MemoryRecord, Claim):
        fields = {field.name.removesuffix("_") for field in dataclasses.fields(cls)}
        assert fields - words <= {"q25_us", "q75_us", "median_us"}, cls
    assert f"schema version {record.SCHEMA_VERSION}" in text
    assert f'`"{claims.SCHEMA}"`, `{claims.SCHEMA_VERSION}`' in text


@pytest.mark.parametrize("module", ["report", "publish", "pictures"])
def test_commands_refuse_other_files_in_a_sentence(module: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for content, sentence in ((None, "No such file"), ("[]", "expected a JSON object, got list")):
        if content is not None:
            path.write_text(content)
        command = [sys.executable, "-m", f"benchmarks.{module}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 1
        assert done.stderr.startswith(f"python -m benchmarks.{module}: {path}: {sentence}")


@pytest.mark.parametrize("option", ["--threads", "--rounds", "--m", "--r"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_numbers_begin_at_one(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([f"{option}={value}"])
    assert f"expected a whole number from 1 on, got {value!r}" in capsys.readouterr().err
