"""docs/ptx-emulator.md names tests that exist, for every line."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "ptx-emulator.md"


@cache
def functions(file: str) -> set[str]:
    """The tests of a file, by their names."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_line_names_tests_that_exist() -> None:
    lines = re.findall(r"^\| (?!what|---)(.*) \| (.*) \|$", PAGE.read_text(), re.M)
    assert len(lines) >= 35
    for what, tests in lines:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", tests)
        assert len(named) == tests.count("::") > 0, what
        for file, name in named:
            assert name in functions(file), f"{what}: {file} has no {name}"
