"""Everything here needs a CUDA compiler, but no GPU."""

from __future__ import annotations

import pytest

from .compile import CompilerMissing, toolkit


@pytest.fixture(autouse=True, scope="session")
def compiler() -> None:
    try:
        toolkit()
    except CompilerMissing as missing:
        pytest.skip(str(missing))
