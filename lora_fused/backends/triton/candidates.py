"""Draft."""
from __future__ import annotations
from dataclasses import replace
from lora_fused.config import Candidate, Problem, Tiles


def rank_block(R: int) -> int:
    """The width of one step of the rank-R term."""
    return min(64, max(16, 1 << (R - 1).bit_length())) if R > 0 else 16


def default_tiles(problem: Problem, operation: str) -> Tiles:
    if operation == "shrink":
        return Tiles(block_m=32, block_k=32, block_r=min(128, max(16, 1 << (problem.R-1).bit_length())), num_warps=4, num_stages=3)
    if operation == "reduce":
        return Tiles(block_m=32, block_n=32, block_r=min(128, max(16, 1 << (problem.R-1).bit_length())), num_warps=4, num_stages=3, splits=2)
    return Tiles(32, 32, 32, num_warps=4, num_stages=3)


def tiles_without_descriptors(tiles: Tiles) -> Tiles:
    return replace(tiles, descriptors=False, persistent=False)


def candidates(problem, device, operation) -> list[Candidate]:
    return []
