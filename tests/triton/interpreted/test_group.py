"""Groups: every step of q/k/v in one launch, against the reference member by member."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_fused.config import Tiles
from tests.triton.operations import check_group, group_case, group_route_of

TILES = Tiles(32, 32, 32, num_warps=4, num_stages=3)


@pytest.mark.parametrize("dropout", ["none", "one mask", "own masks"])
@pytest.mark.parametrize("strategy", ["split", "library"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group(dtype: torch.dtype, strategy: str, dropout: str) -> None:
    cases = group_case(35, 40, [(48, 8), (16, 16), (33, 5)], dtype, dropout)
    check_group(cases, group_route_of(cases, strategy))


@pytest.mark.parametrize("sizes", [[(48, 8), (16, 16)], [(64, 16), (16, 8), (24, 3)]])
def test_one_pass(sizes: list[tuple[int, int]]) -> None:
    cases = group_case(35, 40, sizes, torch.bfloat16, "none")
    tiles = replace(TILES, block_r=16)
    check_group(cases, group_route_of(cases, "one_pass", forward=tiles, dx=tiles))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dropout", ["none", "own masks"])
def test_descriptors(dropout: str, persistent: bool) -> None:
    cases = group_case(70, 40, [(48, 8), (16, 16), (64, 8)], torch.bfloat16, dropout)
    tiles = replace(TILES, descriptors=True, persistent=persistent)
    check_group(cases, group_route_of(cases, "split", forward=tiles, dx=tiles))


@pytest.mark.parametrize("needs", ["x", "lora_A", "lora_B"])
def test_only_what_is_needed(needs: str) -> None:
    cases = group_case(20, 24, [(16, 4), (8, 4)], torch.float32, "none")
    route = group_route_of(cases, "split")
    route = replace(route, needs=frozenset({needs}))
    outputs = check_group(cases, route)
    kinds = {"x": "dx", "lora_A": "da", "lora_B": "db"}
    assert {name.rstrip("012") for name in outputs} == {"y", "s", kinds[needs]}


def test_wide_stack() -> None:
    """Three members of rank 128: 384 columns."""
    cases = group_case(20, 48, [(48, 128)] * 3, torch.bfloat16, "none")
    check_group(cases, group_route_of(cases, "split"))
