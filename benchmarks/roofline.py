"""How far a measured time is from the machine's measured roofs, and what a layer must move.

The roofs are those of roof.py, in a result's `machine`: `gemm_gflops` per dtype and `copy_gbytes`.
Work with fewer FLOPs per byte than gemm ÷ copy is bound by memory, the rest by arithmetic. More
than 100 % is possible: of the copy roof where operands come from a cache, of the GEMM roof where
the code is faster than the vendor's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import FROZEN
from benchmarks.record import Record, Results, SuiteRecord
from benchmarks.shapes import DTYPES, FORWARD
from benchmarks.summary import GOAL_RANK, in_order, m_class
from benchmarks.timing import geometric_mean

_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Roofs:
    """10^9 FLOP/s of the vendor's GEMM, 10^9 bytes/s of a copy (read and written)."""

    gemm_gflops: float
    copy_gbytes: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which the two meet."""
        return self.gemm_gflops / self.copy_gbytes

    def gflops_at(self, intensity: float) -> float:
        """What is attainable with so many FLOPs per byte."""
        return min(self.gemm_gflops, intensity * self.copy_gbytes)

    def least_us(self, flops: float, bytes_moved: float) -> float:
        """The time under the roofs: of the slower of arithmetic and memory."""
        return max(flops / self.gemm_gflops, bytes_moved / self.copy_gbytes) / 1000


def roofs_of(machine: Mapping[str, Any], dtype: str) -> Roofs | None:
    """The roofs of a result's machine for a dtype; None where they were not measured."""
    gemm, copy = machine.get("gemm_gflops", {}).get(dtype), machine.get("copy_gbytes")
    return Roofs(gemm, copy) if gemm and copy else None


def roof_percent(
    machine: Mapping[str, Any], dtype: str, flops: float, bytes_moved: float, us: float
) -> float | None:
    """The share of `us` that the roofs allow for the work; None without roofs."""
    roofs = roofs_of(machine, dtype)
    return None if roofs is None else 100 * roofs.least_us(flops, bytes_moved) / us


def layer_bytes(M: int, K: int, N: int, R: int, dtype: str, pass_: str) -> int:
    """The least that a LoRA layer (R = 0: the frozen layer) reads and writes, each tensor once.

    Forward x, w, a, b and y; backward dy, w, a, b, dx and, for the gradients of the adapters, x
    again, da and db.
    """
    weights = K * N + R * (K + N)
    forward = M * K + M * N + weights
    if pass_ == FORWARD:
        return forward * _ITEM_BYTES[dtype]
    adapters = M * K + R * (K + N) if R else 0
    return (2 * forward + adapters) * _ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Point:
    """A record on the roofline: FLOPs per byte, and 10^9 FLOP/s."""

    intensity: float
    gflops: float


def point_of(record: Record, lora: bool) -> Point | None:
    """Where a timed record of the layer suite stands; None if it was not timed."""
    if record.gflops is None or record.median_us is None:
        return None
    rank = record.R if lora else 0
    moved = layer_bytes(record.M, record.K, record.N, rank, record.dtype, record.pass_)
    return Point(record.gflops * 1000 * record.median_us / moved, record.gflops)


def percent_of(machine: Mapping[str, Any], record: Record, lora: bool) -> float | None:
    """roof_percent of a record of the layer suite."""
    point, roofs = point_of(record, lora), roofs_of(machine, record.dtype)
    if point is None or roofs is None:
        return None
    return 100 * point.gflops / roofs.gflops_at(point.intensity)


def percent_of_item(machine: Mapping[str, Any], record: SuiteRecord) -> float | None:
    """roof_percent of a record of another suite.

    None where it has no work: by one roof alone a call that it does not bind would look slow.
    """
    if not (record.median_us and record.flops and record.bytes_moved):
        return None
    return roof_percent(machine, record.dtype, record.flops, record.bytes_moved, record.median_us)


@dataclass(frozen=True)
class RoofRow:
    """The roofs for a dtype; fma_gflops of one core, None where it could not be measured."""

    dtype: str
    roofs: Roofs
    fma_gflops: float | None


@dataclass(frozen=True)
class PercentTable:
    """Geometric means of the per cent of the roof, forward, r <= 16, without dropout."""

    names: list[str]
    rows: list[tuple[str, str, list[str]]]


def roof_rows(results: Results) -> list[RoofRow]:
    """One per dtype whose roofs were measured."""
    peaks = results.machine["peak_gflops"]
    return [
        RoofRow(dtype, roofs, peaks.get(dtype))
        for dtype in DTYPES
        if (roofs := roofs_of(results.machine, dtype)) is not None
    ]


def percent_table(results: Results) -> PercentTable | None:
    """None where there are no roofs or no timed records."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in _chosen(results.records):
        percent = percent_of(results.machine, r, lora=r.provider != FROZEN)
        if percent is not None:
            found[r.dtype, m_class(r.M)][r.provider].append(percent)
    names = in_order(name for row in found.values() for name in row)
    rows = [
        (dtype, M, [f"{geometric_mean(row[n]):.0f}" if n in row else "-" for n in names])
        for (dtype, M), row in found.items()
    ]
    return PercentTable(names, rows) if rows else None


def _chosen(records: Sequence[Record]) -> list[Record]:
    own = [r for r in records if r.pass_ == FORWARD and not r.dropout and r.R <= GOAL_RANK]
    return sorted(own, key=lambda r: (DTYPES.index(r.dtype), r.M))
