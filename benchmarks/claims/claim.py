"""One line of the suite: what the paper says, what is found here, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """`section`: of arXiv 2106.09685. `value`: the number behind `here`, for the result file."""

    group: str
    section: str
    what: str
    paper: str
    here: str
    value: float
    how: str
    note: str = ""


def millions(count: int) -> str:
    return f"{count:,} ({count / 1e6:.2f} M)"


def size(nbytes: float) -> str:
    """Bytes in powers of 1000, as the paper counts them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    raise AssertionError


class Missing(Exception):
    """A part of the claims cannot run here. The message says what is missing and how to get it."""
