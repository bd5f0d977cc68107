"""Which opcode variants the tests of single instructions execute: `variants.txt`.

    python -m tests.ptx_emulator.variants

runs those tests and writes the file anew. test_census.py and tests/triton/test_census.py hold every
compiled kernel against it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from . import launch

HERE = Path(__file__).parent
FILE = HERE / "variants.txt"
# tests with values worked out by hand from the text of the ISA; no compiled kernel runs in them
NAMES = (
    "scalar", "variants", "corners", "synchronisation", "mbarrier", "bulk_copy", "calls",
    "memory_checks", "tensor_paths", "tcgen05_order", "flags", "launch_state", "tensor_map",
    "mma", "wgmma",
)  # fmt: skip
COMPILED = ("test_counters", "test_a_multicast_reads_global_memory_once", "nvcc")


def with_a_test() -> set[str]:
    """What the file lists."""
    return set(FILE.read_text().split())


class _Recorder:
    """A pytest plugin: the instructions of every kernel that is prepared to run."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.prepare = launch._prepare

    def pytest_configure(self) -> None:
        def recording(*args, **kwargs):
            made = self.prepare(*args, **kwargs)
            self.found |= {ins.name for ins in made[0].kernel.instructions}
            return made

        launch._prepare = recording

    def pytest_unconfigure(self) -> None:
        launch._prepare = self.prepare


def recorded() -> set[str]:
    """Run the tests; all have to pass."""
    recorder = _Recorder()
    files = [str(HERE / f"test_{name}.py") for name in NAMES]
    skipped = " or ".join(COMPILED)
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({skipped})"]
    status = pytest.main([*options, *files], [recorder])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests of single instructions ended with {status!r}")
    return recorder.found


def main() -> None:
    FILE.write_text("".join(f"{name}\n" for name in sorted(recorded())))


if __name__ == "__main__":
    main()
