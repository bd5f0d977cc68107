"""Every opcode variant of the fixtures is implemented, and executed by some case."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from .cases import Case, matrix_cases, other_cases
from .census import census, problem, unknown_instructions, unstarted
from .harness import kernel
from .instruction import Kernel
from .syntax import Module, parse
from .testing import FIXTURES, module
from .variants import recorded, with_a_test

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


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_a_test_of_its_own(name: str) -> None:
    for entry in module(name).entries:
        assert set(census(module(name).kernel(entry))) - with_a_test() == set()


@pytest.mark.full
def test_the_list_of_tested_variants_is_true() -> None:
    assert recorded() == with_a_test()


STRANGE = ("bogus", "L2::bogus", "L1::bogus", "v3", "f16x3", "shared::bogus")
RARER = """
    griddepcontrol.wait; nanosleep.u32 100; prefetch.global.L2 [%a0]; bfe.s32 %r1, %r2, 3, 4;
    createpolicy.fractional.L2::evict_last.b64 %d1, 0f3F800000; match.any.sync.b32 %r1, %r2, -1;
    vote.sync.ballot.b32 %r1, %p1, -1; redux.sync.add.u32 %r1, %r2, -1; activemask.b32 %r1;
    bar.red.popc.u32 %r1, 0, %p1; cp.async.mbarrier.arrive.noinc.b64 [%d1]; popc.b32 %r1, %r2;
    cp.async.bulk.prefetch.tensor.2d.L2.global [%d1, {%r1, %r2}]; brev.b32 %r1, %r2;
    lop3.b32 %r1, %r2, %r3, %r4, 5; prmt.b32 %r1, %r2, %r3, 0x5410; mapa.u64 %d1, %d2, %r1;
    copysign.f32 %r1, %r2, %r3; shf.l.wrap.b32 %r1, %r2, %r3, %r4; fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 16; elect.sync %r1|%p1, -1; trap;
"""


def accepted(parsed: Module, entry: Kernel) -> set[str]:
    """Instructions that are still known with one strange modifier added, anywhere in them."""
    machine = unstarted(parsed, entry)
    found = set()
    for ins in {ins.name: ins for ins in entry.instructions}.values():
        for at in range(len(ins.modifiers) + 1):
            for strange in STRANGE:
                mutant = replace(ins, modifiers=(*ins.modifiers[:at], strange, *ins.modifiers[at:]))
                if f"line {ins.line}:" not in problem(machine, mutant):
                    found.add(mutant.name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_strange_modifier_raises_with_the_line(name: str) -> None:
    parsed = module(name)
    for entry in parsed.entries:
        assert accepted(parsed, parsed.kernel(entry)) == set()


def test_a_strange_modifier_raises_on_rarer_opcodes() -> None:
    text = kernel(RARER, 1, declarations=".extern .shared .align 16 .b8 smem[];")
    parsed = parse(text)
    assert unknown_instructions(parsed, parsed.kernel("k")) == []
    assert accepted(parsed, parsed.kernel("k")) == set()
