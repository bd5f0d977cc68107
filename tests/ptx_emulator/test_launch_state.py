"""Registers moved by setmaxnreg, dependent launches, and tensor maps edited in global memory."""

from __future__ import annotations

import re

import numpy as np
import pytest

from . import EVERY_SCHEDULE, Report, Uninitialised, run
from .cases import Case
from .harness import kernel
from .testing import fixture

# Warps 0-3 give registers away, warps 4-7 take them; %r9 makes the givers late.
EXCHANGE = """setp.lt.u32 %p1, %t, 128; @%p1 bra GIVE;
    setmaxnreg.inc.sync.aligned.u32 {take}; bra DONE;
    GIVE: mov.u32 %r9, 0;
    LATE: add.u32 %r9, %r9, 1; nanosleep.u32 10; setp.lt.u32 %p2, %r9, 5; @%p2 bra LATE;
    setmaxnreg.dec.sync.aligned.u32 {give};
    DONE:"""


def exchange(give: int, take: int, registers: int | None = 104) -> set[str]:
    kinds = set()
    for schedule in EVERY_SCHEDULE:
        text = kernel(EXCHANGE.format(give=give, take=take), 0)
        kinds |= run(text, "k", 3, 256, [], registers=registers, schedule=schedule).kinds()
    return kinds


def test_registers_move_between_warps() -> None:
    assert exchange(24, 184) == set()  # 104 - 24 = 184 - 104


def test_registers_that_nobody_releases_are_waited_for_forever() -> None:
    assert exchange(24, 192) == {"deadlock"}


@pytest.mark.parametrize(("give", "take"), [(112, 184), (24, 96)])
def test_a_count_in_the_wrong_direction(give: int, take: int) -> None:
    assert "register-count" in exchange(give, take)


def test_without_a_register_count_only_the_form_is_checked() -> None:
    assert exchange(24, 192, None) == set()


def test_compiled_kernel_has_the_registers_it_asks_for() -> None:
    """hopper_gemm: 128 threads down to 40, 128 up to 200: from 120 up, its launch has enough."""
    sizes = {"M": 136, "N": 72, "K": 200}
    assert Case("hopper_gemm", sizes, options={"registers": 120}).run().report.ok
    starved = Case("hopper_gemm", sizes, options={"registers": 112}).run().report
    assert starved.kinds() == {"deadlock"} and "registers" in str(starved.findings[0])


COPY = """mul.wide.u32 %d1, %t, 4; add.s64 %a0, %a0, %d1; add.s64 %a1, %a1, %d1;
    {before} ld.global.b32 %r1, [%a0]; {after} st.global.b32 [%a1], %r1;"""


def copy(before: str, after: str, *, dependent: bool = True) -> Report:
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    text = kernel(COPY.format(before=before, after=after), 2)
    report = run(text, "k", 2, 16, [x, Uninitialised(y)], after=[x] if dependent else [])
    assert (y[:16] == x[:16]).all()
    return report


def test_a_dependent_kernel_waits_before_it_reads() -> None:
    assert copy("griddepcontrol.wait;", "griddepcontrol.launch_dependents;").ok
    assert copy("", "griddepcontrol.wait;", dependent=False).ok
    found = copy("griddepcontrol.launch_dependents;", "griddepcontrol.wait;").findings
    assert {f.kind for f in found} == {"dependent-launch"} and "ld.global" in found[0].text


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_an_edited_map_is_acquired_before_use(capability: int, nth: int) -> None:
    case = Case(f"descriptor_bf16_{capability}", {"M": 72, "N": 80, "K": 112})
    text = fixture(case.fixture)
    fences = list(re.finditer(r"@%p\d+ fence\.proxy\.tensormap\S* [^;]*;", text))
    assert len(fences) == 3
    begin, end = fences[nth].span()
    report = case.run(text=text[:begin] + text[end:]).report
    assert report.kinds() == {"missing-proxy-fence"}
    assert "cp.async.bulk.tensor" in report.findings[0].text
