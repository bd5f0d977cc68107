"""Every instruction of every shipped choice is implemented and has a test of its own.

By default the choices that test_shipped.py compiles anyway; `full` takes all of them.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from lora_fused.backends.triton.candidates import AMD, SHIPPED, Shipped
from tests.ptx_emulator import parse
from tests.ptx_emulator.census import census, unknown_instructions
from tests.ptx_emulator.variants import with_a_test
from tests.triton.shipped import compiled
from tests.triton.test_shipped import REPRESENTATIVE


def check(choice: Shipped) -> None:
    for made in compiled(choice):
        module = parse(made.ptx)
        for entry in module.entries:
            kernel = module.kernel(entry)
            assert unknown_instructions(module, kernel) == []
            assert set(census(kernel)) - with_a_test() == set()


def on_nvidia(choices: list[Shipped]) -> list[Shipped]:
    return [choice for choice in choices if choice.target not in AMD]


@pytest.mark.parametrize("choice", on_nvidia(REPRESENTATIVE), ids=str)
def test_representative(choice: Shipped) -> None:
    check(choice)


@pytest.mark.full
@pytest.mark.parametrize("choice", on_nvidia(list(SHIPPED)), ids=str)
def test_all(choice: Shipped) -> None:
    check(choice)
