"""How much of a measured time the machine's measured roofs allow for the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.record import SuiteRecord


def roof_percent(machine: Mapping[str, Any], record: SuiteRecord) -> float | None:
    """100 · max(flops ÷ GEMM rate, bytes ÷ copy bandwidth) ÷ median time.

    None where the record was not timed or has no work, or the machine lacks one of the roofs: by
    the other alone a call that it does not bind would look slow.
    """
    gemm, copy = machine.get("gemm_gflops", {}).get(record.dtype), machine.get("copy_gbytes")
    if not (record.median_us and record.flops and record.bytes_moved and gemm and copy):
        return None
    least_us = max(record.flops / gemm, record.bytes_moved / copy) / 1000
    return float(100 * least_us / record.median_us)
