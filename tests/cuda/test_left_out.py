"""Why the CUDA kernels leave a strategy out: said whenever one is, and never when none is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fused import alternatives
from lora_fused.backends import BACKENDS, cuda
from lora_fused.backends.cuda_candidates import DECODE_TOKENS, DTYPES, candidates, left_out
from lora_fused.config import Problem
from lora_fused.devices import DEVICES, Device
from lora_fused.gpu_choice import configure_by_model

H100, A100, B200 = (DEVICES[name] for name in ("H100", "A100", "B200"))
NVIDIA = [device for device in DEVICES.values() if device.kind == "cuda"]
TRAINED = frozenset({"x", "lora_A", "lora_B"})
STRATEGIES = ("s_first", "split", "decode")


def problem(M: int = 4096, device: Device = H100, **other) -> Problem:
    made = Problem(M, 4096, 4096, 16, torch.bfloat16, "cuda", needs=TRAINED, device=device)
    return replace(made, **other)


sizes = st.one_of(st.integers(1, 64), st.integers(1, 1024).map(lambda n: 8 * n))


@given(
    M=sizes, K=sizes, N=sizes, R=st.integers(1, 512), dropout=st.booleans(), aligned=st.booleans(),
    given_mask=st.booleans(), members=st.sampled_from([0, 2, 3, 4]), device=st.sampled_from(NVIDIA),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["row", "column", "strided"]),
    needs=st.sampled_from([frozenset(), TRAINED]),
)  # fmt: skip
def test_a_strategy_is_offered_or_a_reason_is_given(
    M: int, K: int, N: int, R: int, dropout: bool, aligned: bool, given_mask: bool, members: int,
    device: Device, dtype: torch.dtype, layout: str, needs: frozenset[str],
) -> None:  # fmt: skip
    group = ((N, R),) * members
    asked = Problem(
        M, K, N * max(members, 1), R * max(members, 1), dtype, "cuda", needs=needs, device=device,
        dropout=dropout, aligned=aligned, given_mask=given_mask, weight_layout=layout, group=group,
    )  # fmt: skip
    lines = left_out(asked)
    assert len(set(lines)) == len(lines)
    for direction, what in (("forward", "y"), ("dx", "dx"))[: 2 if needs else 1]:
        have = {c.strategy for c in candidates(asked, device, direction)}
        for strategy in STRATEGIES:
            said = any(_is_about(line, strategy, what) for line in lines)
            silent = strategy == "decode" and M > DECODE_TOKENS
            assert said != (strategy in have or silent), (strategy, direction, lines)


def _is_about(line: str, strategy: str, what: str) -> bool:
    """ "s_first and split of dx: …" is about both strategies, in one direction."""
    names, _, direction = line.partition(": ")[0].partition(" of ")
    return strategy in names.split(" and ") and direction in ("", what)


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        (problem(), []),
        (problem(device=A100, dropout=True), []),
        (problem(8), ["decode of dx: it needs a weight with unit stride along out_features"]),
        (problem(8, needs=frozenset()), []),
        (
            problem(8, needs=frozenset(), dropout=True),
            ["decode: it makes no dropout mask"],
        ),
        (
            problem(dtype=torch.float32),
            ["s_first and split: the Hopper kernel multiplies bfloat16 and float16"],
        ),
        (
            problem(device=B200),
            ["s_first and split: mma.sync is not the fast path of sm_100"],
        ),
        (
            problem(N=12288, R=48, group=((4096, 16),) * 3),
            ["split: it takes single layers"],
        ),
    ],
)  # fmt: skip
def test_words(asked: Problem, lines: list[str]) -> None:
    assert left_out(asked) == lines


def test_nothing_is_said_of_a_device_that_is_not_known() -> None:
    assert left_out(problem(device=None)) == []


def test_explain_says_why_a_strategy_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cuda", cuda)
    asked = problem(device=B200)
    lines = alternatives.describe(
        asked, configure_by_model(asked, ("cuda",)), ("cuda",), torch.device("cpu")
    )
    assert "cuda: s_first and split: mma.sync is not the fast path of sm_100" in lines
