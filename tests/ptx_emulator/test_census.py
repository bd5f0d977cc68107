"""Every opcode variant of the fixtures is implemented, and executed by some case."""

from __future__ import annotations

from collections import Counter

import pytest

from .cases import Case, matrix_cases, other_cases
from .census import census, unknown_instructions
from .testing import FIXTURES, module

UNREACHED = {"mov.b16"}  # initialises registers of masked loads; see test_scalar

NAMES = sorted(path.stem for path in FIXTURES.glob("*.ptx"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_unknown(name: str) -> None:
    parsed = module(name)
    for entry in parsed.entries:
        assert unknown_instructions(parsed, parsed.kernel(entry)) == []


def test_the_census_is_executed() -> None:
    present: Counter[str] = Counter()
    for name in NAMES:
        for entry in module(name).entries:
            present += census(module(name).kernel(entry))
    executed: set[str] = set()
    for case in matrix_cases() + other_cases():
        if "_" not in case.fixture:
            continue
        counted = Case(case.fixture, case.sizes, options={**case.options, "counters": True})
        executed |= set(counted.run().report.counters.opcodes)
    elsewhere: set[str] = set()  # these run in tests of their own
    for name in ("blocks", "arithmetic"):
        for entry in module(name).entries:
            elsewhere |= set(census(module(name).kernel(entry)))
    transpose = set(census(module("tile_gemm").kernel("transpose")))
    assert len(present) > 150
    assert set(present) - executed - elsewhere - transpose == UNREACHED
