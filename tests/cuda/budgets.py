"""What ptxas and the disassembler must say about a kernel."""

from __future__ import annotations

import pytest

from .compile import compiler_log, resources, sass

EVERY_TARGET = [
    "sm_80",
    "sm_90a",
    *(pytest.param(f"sm_{n}", marks=pytest.mark.full) for n in (86, 89, 100, 120)),
]


def assert_budget(source: str, arch: str, registers: int, tensor: str) -> None:
    """No spills, no stack, at most so many registers, tensor instructions, no ptxas warnings."""
    found, code = resources(source, arch), sass(source, arch)
    assert found and set(found) <= set(code)
    for name, used in found.items():
        assert used.spill_stores == used.spill_loads == used.stack == 0, (name, used)
        assert used.registers <= registers, (name, used)
        assert tensor in code[name], name
        assert "STL" not in code[name] and "LDL" not in code[name], name
    assert "warning" not in compiler_log(source, arch).lower()
