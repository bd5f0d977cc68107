"""Every instruction of every CUDA kernel, for every target, is one that the emulator implements
and that a test of its own executes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ptx_emulator import parse
from tests.ptx_emulator.census import census, unknown_instructions
from tests.ptx_emulator.variants import with_a_test

from .compile import ROOT, ptx

SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").rglob("*.cu"))
OTHERS = ("sm_86", "sm_89", "sm_100", "sm_120")


def is_hopper(source: str) -> bool:
    return Path(source).parent.name == "sm90"


def pairs() -> list[object]:
    found: list[object] = []
    for source in SOURCES:
        if is_hopper(source):
            found.append((source, "sm_90a"))
        else:
            found.append((source, "sm_80"))
            later = ("sm_90a", *OTHERS)
            found += [pytest.param(source, arch, marks=pytest.mark.full) for arch in later]
    return found


@pytest.mark.parametrize(("source", "arch"), pairs())
def test_nothing_is_unknown(source: str, arch: str) -> None:
    module = parse(ptx(source, arch))
    assert module.entries
    for entry in module.entries:
        assert unknown_instructions(module, module.kernel(entry)) == []
        assert set(census(module.kernel(entry))) - with_a_test() == set()
