"""Which problems the Triton backend takes, and its candidates: no GPU, no compiler."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fused import alternatives
from lora_fused.backends import triton
from lora_fused.backends.triton import candidates as candidates_of
from lora_fused.backends.triton.candidates import (
    DECODE_TOKENS,
    SHIPPED,
    kind_of,
    target_of,
    tiles_without_descriptors,
)
from lora_fused.config import FUSED_STRATEGIES, Problem
from lora_fused.devices import DEVICES, Device
from lora_fused.gpu_choice import configure_by_model

H100 = DEVICES["H100"]
OPERATIONS = ("forward", "dx", "shrink", "reduce")


def problem(M: int = 4096, K: int = 4096, N: int = 4096, R: int = 16, **other: object) -> Problem:
    dtype = other.pop("dtype", torch.bfloat16)
    return replace(Problem(M, K, N, R, dtype, device_type="cuda", device=H100), **other)  # type: ignore


def test_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = Problem(4, 8, 8, 2, torch.float32)
    assert "TRITON_INTERPRET" in "; ".join(triton.not_supported_reasons(cpu))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not any("TRITON" in reason for reason in triton.not_supported_reasons(cpu))


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "not installed"), ((3, 6), "triton is 3.6"), ((3, 7), "")]
)
def test_versions(
    version: tuple[int, int] | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "triton_version", lambda: version)
    reasons = "; ".join(triton.not_supported_reasons(problem()))
    assert reason in reasons and bool(reason) == bool(reasons)


def test_old_gpus_are_refused() -> None:
    old = replace(H100, capability=75)
    assert "sm_75" in "; ".join(triton.not_supported_reasons(problem(device=old)))


def test_importing_the_backend_leaves_the_kernels_alone() -> None:
    """They are decorated at first use, when TRITON_INTERPRET has its say."""
    name = "lora_fused.backends.triton"
    code = f"import sys, {name}; sys.exit('{name}.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("kind", "capability", "target"),
    [
        ("cuda", 80, "sm_80"), ("cuda", 87, "sm_86"), ("cuda", 89, "sm_89"), ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_100"), ("cuda", 103, "sm_100"), ("cuda", 121, "sm_120"),
        ("cuda", 110, ""), ("hip", 942, "gfx942"), ("hip", 1100, ""),
    ],
)  # fmt: skip
def test_targets(kind: str, capability: int, target: str) -> None:
    assert target_of(replace(H100, kind=kind, capability=capability)) == target


sizes = st.integers(1, 20000)


@given(
    M=sizes, K=sizes, N=sizes, R=st.integers(1, 512), dropout=st.booleans(), aligned=st.booleans(),
    device=st.sampled_from(list(DEVICES.values())), operation=st.sampled_from(OPERATIONS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
def test_candidates_are_legal(
    M: int, K: int, N: int, R: int, dropout: bool, aligned: bool,
    device: Device, operation: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Always some, all of them shipped, within the device's limits and the kernels' own."""
    asked = problem(M, K, N, R, dtype=dtype, dropout=dropout, aligned=aligned, device=device)
    found = triton.candidates(asked, device, operation)
    assert found
    shipped = {
        (c.operation, c.strategy, c.tiles)
        for c in SHIPPED
        if (c.target, c.kind) == (target_of(device), kind_of(dtype))
    }
    for candidate in found:
        tiles = candidate.tiles
        assert (operation, candidate.strategy, replace(tiles, splits=1)) in shipped
        assert 0 < candidate.shared_bytes <= device.shared_bytes_per_block
        assert candidate.registers > 0 and 1 <= tiles.splits <= 16
        if candidate.strategy in FUSED_STRATEGIES:
            assert not dropout and tiles.block_r >= R
            assert (candidate.strategy == "decode") == (M <= DECODE_TOKENS)
        if tiles.descriptors:
            assert aligned and (K * dtype.itemsize) % 16 == 0 and (N * dtype.itemsize) % 16 == 0


@given(
    M=sizes, R=st.integers(1, 512), dropout=st.booleans(),
    operation=st.sampled_from(OPERATIONS[:2]), device=st.sampled_from(list(DEVICES.values())),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_one_launch_is_offered_or_a_reason_is_given(
    M: int, R: int, dropout: bool, operation: str, device: Device, dtype: torch.dtype
) -> None:
    asked = problem(M, R=R, dtype=dtype, dropout=dropout, device=device)
    found = {c.strategy for c in triton.candidates(asked, device, operation)}
    assert bool(triton.left_out(asked)) != bool(found & FUSED_STRATEGIES)


def test_explain_says_why_one_launch_is_left_out() -> None:
    asked = problem(dropout=True, needs=frozenset({"x", "lora_A", "lora_B"}))
    lines = alternatives.describe(
        asked, configure_by_model(asked, ("triton",)), ("triton",), torch.device("cpu")
    )
    assert "triton: one_pass and decode make no dropout mask" in lines


def test_what_stands_in_for_descriptors_is_shipped() -> None:
    """Where TMA does not reach the tensors after all, the launch still has tested code."""
    have = {(c.target, c.operation, c.strategy, c.kind, c.tiles) for c in SHIPPED}
    for c in SHIPPED:
        if c.tiles.descriptors and c.strategy == "split":
            stand_in = tiles_without_descriptors(c.tiles)
            assert (c.target, c.operation, c.strategy, c.kind, stand_in) in have


def test_groups() -> None:
    group = ((4096, 16), (1024, 16), (1024, 16))
    whole = problem(N=6144, R=48, group=group)
    assert {c.strategy for c in triton.candidates(whole, H100, "forward")} == {"split", "one_pass"}
    (reduce,) = triton.candidates(whole, H100, "reduce")
    assert reduce.tiles.block_r == 64  # the stacked ds against x, read once
    (own_masks,) = triton.candidates(replace(whole, dropout=True), H100, "reduce")
    assert own_masks.tiles.block_r == 16


def test_a_bias_on_sm_100_goes_where_the_code_is_sound() -> None:
    b200 = DEVICES["B200"]
    asked = problem(device=b200, has_bias=True)
    tiles = [c.tiles for c in triton.candidates(asked, b200, "forward")]
    assert tiles and all(t.block_m == t.block_n == 128 for t in tiles)
    assert len(triton.candidates(problem(device=b200), b200, "forward")) > len(tiles)


def test_the_module_and_the_function_share_a_name() -> None:
    assert candidates_of is triton.candidates
