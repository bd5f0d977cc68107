"""The README's numbers are those of a committed result file."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.publish import BEGIN, END, FIGURE, README, ROOT, section
from benchmarks.record import Results


def test_the_readme_says_what_the_result_file_says() -> None:
    text = README.read_text()
    shown = re.search(f"{BEGIN}\n(.*)\n{END}", text, re.S)
    assert shown is not None
    name = re.search(r"\(benchmarks/results/([^)]+\.json)\)", shown[1])
    assert name is not None
    results = Results.load(ROOT / "benchmarks" / "results" / name[1])
    assert shown[1] == section(results, name[1])


def test_the_readmes_picture_is_there() -> None:
    assert "docs/tax.svg" in README.read_text() and FIGURE.read_text().startswith("<?xml")
