"""Everything here needs a CUDA compiler, but no GPU. What the emulator ran is remembered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import cases
from .compile import CompilerMissing, toolkit


@pytest.fixture(autouse=True, scope="session")
def compiler() -> None:
    try:
        toolkit()
    except CompilerMissing as missing:
        pytest.skip(str(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with cases.noted() as kernels:
        result = yield
    cases.keep(item.nodeid, kernels)
    return result
