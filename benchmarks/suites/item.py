"""What a suite is made of: items, on each of which contenders are built, checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.numerics import Verdict

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """The least that one call takes: FLOPs, and bytes read and written (None: not defined)."""

    flops: int
    bytes_moved: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes above inputs and parameters: the allocator's peak, what stays alive for backward, and
    the resident peak of the process; None where it was not measured."""

    peak_bytes: int
    held_bytes: int | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True)
class Ready:
    """A contender that is built.

    calls: one per pass, empty if nothing is to be timed. check: judges its results; called first.
    memory: measures the item's last pass. work: what a call of each pass takes at least.
    """

    calls: Mapping[str, Call]
    check: Callable[[], Verdict]
    memory: Callable[[], Memory] | None = None
    work: Mapping[str, Work] = field(default_factory=dict)


Makers = Mapping[str, Callable[[], Ready]]
"""By provider. A maker that raises is reported as an error, and the others go on."""


@dataclass(frozen=True)
class Item:
    """One thing to measure: all contenders meet in the same rounds of each pass.

    contenders: called when the item's turn comes; makes the data that its makers share. base: the
    contender whose time is 1.
    """

    name: str
    shape: dict[str, int]
    dtype: str
    passes: tuple[str, ...]
    base: str
    contenders: Callable[[], Makers]

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.name} {self.dtype} {sizes}"


@dataclass(frozen=True)
class Request:
    """What of a suite is asked for. full: every item, else a representative few.

    providers: names and groups, for suites that let them be chosen; None: the suite's own.
    """

    full: bool
    device: str
    dtypes: tuple[str, ...]
    providers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Suite:
    """quick_seconds: after so many no item of a quick run starts any more.

    eager: on a GPU timed by the wall clock, launches included, and not as a CUDA graph.
    """

    name: str
    about: str
    quick_seconds: float
    items: Callable[[Request], Iterable[Item]]
    eager: bool = False
