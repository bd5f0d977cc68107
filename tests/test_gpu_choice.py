"""The choice among options and prices, and the names under which timings are kept: no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_fused import cost, gpu_choice, gpu_tuning
from lora_fused.backends import triton
from lora_fused.config import Problem, Tiles
from lora_fused.devices import DEVICES
from lora_fused.gpu_choice import MARGIN, Option, configure
from tests.gpu_double import PROBLEM

TILES = Tiles(128, 128, 64, num_warps=8, num_stages=3)
LIBRARY = Option("forward", "torch", "library", None, None, 100.0)
SPLIT = Option("forward", "triton", "split", TILES, TILES, 90.0)
ONE_PASS = Option("forward", "triton", "one_pass", TILES, None, 1.0)


def strategy(prices: dict[str, float]) -> str:
    """What is taken for the forward with these measured times."""
    options = {"forward": [LIBRARY, SPLIT, ONE_PASS]}
    problem = replace(PROBLEM, needs=frozenset())
    return configure(problem, options, {"triton": TILES}, {"forward": prices}).forward


def test_an_option_that_was_not_timed_is_left_aside_though_the_model_likes_it() -> None:
    assert strategy({"library": 100.0, SPLIT.name: 50.0}) == "split"
    assert strategy({"library": 100.0, SPLIT.name: 200.0}) == "library"
    assert strategy({}) == "one_pass", "without times the model decides"


def test_the_library_has_its_head_start() -> None:
    assert strategy({"library": 100.0, SPLIT.name: 100.0 * MARGIN + 0.1}) == "library"
    assert strategy({"library": 100.0, SPLIT.name: 100.0 * MARGIN - 0.1}) == "split"


def test_a_dx_by_torch_pays_for_the_mask_that_kernels_regenerate() -> None:
    """Kernels in the forward that save less than that leave the whole call to torch."""
    problem = replace(PROBLEM, dropout=True, needs=frozenset({"x"}))
    penalty = cost.masked_expand_us(problem, by_kernel=True)
    assert penalty > 0
    dx = replace(LIBRARY, part="dx")
    for saved, taken in ((penalty - 1, "library"), (penalty + 1, "split")):
        forward = [LIBRARY, replace(SPLIT, predicted_us=LIBRARY.predicted_us - saved)]
        config = configure(problem, {"forward": forward, "dx": [dx]}, {"triton": TILES})
        assert config.forward == taken
    drawn = replace(problem, given_mask=True)  # a mask that is there already costs nothing
    forward = [LIBRARY, replace(SPLIT, predicted_us=LIBRARY.predicted_us - 1)]
    assert configure(drawn, {"forward": forward, "dx": [dx]}, {"triton": TILES}).forward == "split"


@pytest.mark.parametrize(
    "change",
    [
        {"M": 100}, {"K": 4104}, {"N": 4104}, {"R": 8}, {"dtype": torch.float16},
        {"adapter_dtype": torch.float32}, {"has_bias": True}, {"dropout": True},
        {"dropout": True, "given_mask": True}, {"weight_layout": "column"}, {"aligned": False},
        {"tf32": True}, {"group": ((2048, 8), (2048, 8))}, {"group": ((2048, 4), (2048, 12))},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_timing_depends_on_has_a_key_of_its_own(change: dict[str, Any]) -> None:
    base = replace(PROBLEM, adapter_dtype=torch.bfloat16)
    keys = {gpu_tuning._key(base, "forward"), gpu_tuning._key(base, "dx")}
    changed = replace(base, **change)
    assert gpu_tuning._bucket_of(changed) != gpu_tuning._bucket_of(base)
    assert gpu_tuning._key(gpu_tuning._bucket_of(changed), "forward") not in keys


@pytest.mark.parametrize(
    "times",
    [
        {"library": -1.0}, {"library": 0.0}, {"library": "fast"}, {"split": 1.0}, [1.0], None,
        {"library": 1.0, "split": -2.0},
    ],
    ids=str,
)  # fmt: skip
def test_times_that_make_no_sense_are_none(times: object) -> None:
    assert gpu_tuning._sound(times) == {}


def test_times_are_read_as_they_were_stored() -> None:
    assert gpu_tuning._sound({"library": 2, "split": 1.5}) == {"library": 2.0, "split": 1.5}


# --- Triton's candidates -------------------------------------------------------------------------


def found(problem: Problem, operation: str) -> list[Tiles]:
    assert problem.device is not None
    return [c.tiles for c in triton.candidates(problem, problem.device, operation)]


@pytest.mark.parametrize("device", ["A100", "H100", "B200", "RTX 5090"])
def test_wide_tiles_are_for_single_layers_without_a_mask(device: str) -> None:
    """A masked dx and the members of a group need accumulators or registers of their own."""
    base = replace(PROBLEM, device=DEVICES[device])
    assert any(t.block_m * t.block_n > 128 * 128 for t in found(base, "dx"))
    group = replace(base, group=((2048, 16), (2048, 16)), R=32)
    for narrow in (replace(base, dropout=True), group):
        assert all(t.block_m * t.block_n <= 128 * 128 for t in found(narrow, "dx"))


def test_every_member_of_a_group_has_rows_that_descriptors_reach() -> None:
    """Rows of 16 bytes: N of each member counts, not their sum."""
    even = replace(PROBLEM, group=((2048, 16), (2048, 16)), R=32)
    odd = replace(PROBLEM, group=((2044, 16), (2052, 16)), R=32)
    assert any(t.descriptors for t in found(even, "forward"))
    assert not any(t.descriptors for t in found(odd, "forward"))


def test_descriptors_are_for_aligned_rows() -> None:
    assert any(t.descriptors for t in found(PROBLEM, "forward"))
    assert not any(t.descriptors for t in found(replace(PROBLEM, aligned=False), "forward"))


def test_a_device_with_less_shared_memory_gets_what_fits() -> None:
    """A device that nobody listed: tiles by its own limit, not by its name."""
    full = triton.candidates(PROBLEM, DEVICES["H100"], "forward")
    limit = sorted(c.shared_bytes for c in full)[0]
    small = replace(DEVICES["H100"], name="unknown", shared_bytes_per_block=limit)
    assert {c.shared_bytes for c in triton.candidates(PROBLEM, small, "forward")} == {limit}
    none = replace(small, shared_bytes_per_block=limit - 1)
    assert triton.candidates(PROBLEM, none, "forward") == []


def test_parts_of_a_contraction_have_a_few_steps_each() -> None:
    for tiles in found(replace(PROBLEM, M=64, K=1024), "shrink"):
        assert 1 <= tiles.splits <= max(1, 1024 // tiles.block_k // 4)


def test_a_skinny_block_is_the_narrowest_that_holds_the_rank() -> None:
    for R, block in ((1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (300, 128)):
        for operation in ("shrink", "reduce"):
            assert {t.block_r for t in found(replace(PROBLEM, R=R), operation)} == {block}


def test_the_options_of_a_part_are_priced_once() -> None:
    """The same question has the same answer, and the library is one of the options."""
    first = gpu_choice.options(PROBLEM, "forward", ("triton",))
    assert gpu_choice.options(PROBLEM, "forward", ("triton",)) is first
    assert [o.name for o in first].count("library") == 1
