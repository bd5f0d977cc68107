"""Everything that is shipped compiles, within the limits and with the instructions it should have.

By default one matmul and one other kernel per target are compiled; `full` compiles all of them.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from lora_fused.backends.triton.candidates import AMD, NVIDIA, SHIPPED, TARGETS, Shipped
from lora_fused.backends.triton.resources import RESOURCES
from tests.triton.compiled import Compiled
from tests.triton.shipped import REGISTER_LIMIT, SHARED_LIMIT, compiled, problems_with, resources


def first(target: str, operation: str, strategy: str, flags: str = "") -> Shipped:
    """The first choice of a kind that a target has; flags "d" asks for descriptors."""
    return next(
        choice
        for choice in SHIPPED
        if (choice.target, choice.operation, choice.strategy) == (target, operation, strategy)
        and choice.tiles.descriptors >= ("d" in flags)
    )


REPRESENTATIVE = [
    *(first(target, "forward", "split") for target in TARGETS),
    *(first(target, "dx", "one_pass") for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *(first(target, "reduce", "reduce") for target in ("sm_86", "sm_90", "sm_100", "gfx950")),
    *(first(target, "shrink", "shrink") for target in ("sm_89", "sm_120")),
    first("sm_90", "dx", "decode"),
    first("sm_120", "forward", "split", "d"),
]


def check(choice: Shipped) -> None:
    assert problems_with(choice) == []
    assert resources(choice) == RESOURCES[str(choice)]
    for made in compiled(choice):
        check_instructions(choice, made)


def check_instructions(choice: Shipped, made: Compiled) -> None:
    """The tensor cores and the asynchronous copies of the generation are used."""
    sass, tiles = made.sass, choice.tiles
    if choice.target in AMD:
        assert sass["MFMA"] > 0
        return
    copies = "UTMALDG" if tiles.descriptors else "LDGSTS"
    assert sass.get(copies, 0) > 0, "no asynchronous copies into shared memory"
    if tiles.descriptors:
        assert sass.get("UTMASTG", 0) > 0
    if choice.kind == "ieee":
        assert sass["FFMA"] > 0
        return
    small = (tiles.block_n if choice.operation == "reduce" else tiles.block_m) < 64
    product = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(choice.target, "HMMA")
    assert sass.get("HMMA" if small else product, 0) > 0, f"{sass}"


def test_the_table_is_complete() -> None:
    assert list(RESOURCES) == [str(choice) for choice in SHIPPED]
    assert len(set(RESOURCES)) == len(SHIPPED)


def test_the_table_is_within_the_limits() -> None:
    for choice in SHIPPED:
        shared, registers = RESOURCES[str(choice)]
        assert shared <= SHARED_LIMIT[choice.target], choice
        assert registers <= REGISTER_LIMIT[choice.target], choice
        threads = choice.tiles.num_warps * 32
        assert choice.target in AMD or registers * threads <= 65536, choice


@pytest.mark.parametrize("choice", REPRESENTATIVE, ids=str)
def test_representative(choice: Shipped) -> None:
    check(choice)


@pytest.mark.full
@pytest.mark.parametrize("choice", SHIPPED, ids=str)
def test_all(choice: Shipped) -> None:
    check(choice)


def test_a_spill_would_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """128x256 with 4 warps does not fit the registers of sm_100."""
    from dataclasses import replace

    good = first("sm_100", "forward", "split")
    assert (good.tiles.block_m, good.tiles.block_n) == (128, 256)
    bad = good._replace(tiles=replace(good.tiles, num_warps=4))
    assert "spills" in problems_with(bad)[0]


def test_a_compiler_error_is_reported_and_the_next_request_works() -> None:
    """A tile too narrow for tensor cores; the compiling process goes on, or starts again."""
    from dataclasses import replace

    good = first("sm_80", "forward", "one_pass")
    bad = good._replace(tiles=replace(good.tiles, block_n=24))
    with pytest.raises(AssertionError, match="power of 2"):
        problems_with(bad)
    assert problems_with(good) == []


def test_every_target_has_every_operation() -> None:
    for target in NVIDIA:
        kinds = {(c.operation, c.strategy) for c in SHIPPED if c.target == target}
        assert kinds >= {
            ("forward", "split"), ("dx", "split"), ("forward", "one_pass"), ("dx", "one_pass"),
            ("forward", "decode"), ("dx", "decode"), ("shrink", "shrink"), ("reduce", "reduce"),
        }  # fmt: skip
