"""Where a GPU may not be measured: what is used, and how often that is decided."""

from __future__ import annotations

import pytest
import torch

from lora_fused import LoRAWeights, dispatch, gpu_store, gpu_tuning, lora_linear_group
from lora_fused.devices import DEVICES
from tests import fake_backend
from tests.gpu_double import Clock, config_of

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One launch is fast, whatever else slow."""
    made = Clock(0.001, shrink_matmul=0.0001, reduce=0.0001, group=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", made)
    return made


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """M of every problem that was decided."""
    sizes: list[int] = []
    original = gpu_tuning.choose

    def choose(problem, *rest):  # type: ignore[no-untyped-def]
        sizes.append(problem.M)
        return original(problem, *rest)

    monkeypatch.setattr(gpu_tuning, "choose", choose)
    return sizes


def on_another_stream(patch: pytest.MonkeyPatch, other: bool = True) -> None:
    patch.setattr(gpu_tuning, "may_measure", lambda where: not other)


def test_nothing_is_measured_under_capture_but_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.001, shrink_matmul=0.0001, reduce=0.0001)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    monkeypatch.setattr(gpu_tuning, "may_measure", lambda where: False)
    assert config_of().backend == "torch" and clock.runs == 0
    assert not gpu_store.answers(DEVICES["H100"], "check")
    monkeypatch.setattr(gpu_tuning, "may_measure", lambda where: True)
    assert config_of().backend == "triton" and clock.runs > 0
    monkeypatch.setattr(gpu_tuning, "may_measure", lambda where: False)
    assert config_of().backend == "triton", "what is known is used under capture, too"


@pytest.mark.parametrize(
    ("capturing", "same_stream", "allowed"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_when_a_gpu_may_be_measured(
    capturing: bool, same_stream: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda where: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: 0 if same_stream else 1)
    assert gpu_tuning.may_measure(torch.device("cuda", 0)) is allowed
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not gpu_tuning.may_measure(torch.device("cuda", 0))


def test_another_stream_decides_once(
    clock: Clock, decided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_another_stream(monkeypatch)
    configs = [config_of(M) for M in (24, 24, 40, 24, 40)]
    assert decided == [24, 40] and clock.runs == 0
    assert {config.backend for config in configs} == {"torch"}


def test_another_stream_uses_checked_kernels_by_the_model(
    clock: Clock, decided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of(24)
    runs, known = clock.runs, len(decided)
    on_another_stream(monkeypatch)
    configs = [config_of(100) for _ in range(3)]  # a bucket of its own: checked but never timed
    assert len(decided) == known + 1 and clock.runs == runs
    assert {config.backend for config in configs} == {"triton"}
    assert configs[0].measured_us is None


def test_what_is_learned_meanwhile_is_used_on_the_other_stream(
    clock: Clock, decided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_another_stream(monkeypatch)
    assert config_of(24).backend == "torch"
    on_another_stream(monkeypatch, False)
    config_of(17)  # the bucket of 24, on the default stream
    on_another_stream(monkeypatch)
    before = len(decided)
    assert config_of(24).backend == config_of(24).backend == "triton"
    assert len(decided) == before + 1


def test_the_default_stream_has_the_last_word(
    clock: Clock, decided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_another_stream(monkeypatch)
    config_of(24)
    on_another_stream(monkeypatch, False)
    assert config_of(24).measured_us is not None and clock.runs > 0
    on_another_stream(monkeypatch)
    before = len(decided)
    assert config_of(24).measured_us is not None, "it is not decided again"
    assert len(decided) == before


def test_a_group_on_another_stream_is_decided_once(
    clock: Clock, decided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(24, 64, dtype=torch.bfloat16)
    group = [
        LoRAWeights(torch.randn(n, 64).bfloat16(), torch.randn(8, 64).bfloat16(),
                    torch.randn(n, 8).bfloat16(), 1.5)
        for n in (48, 32)
    ]  # fmt: skip
    on_another_stream(monkeypatch)
    lora_linear_group(x, group)
    before = len(decided)
    assert before == 3, "two layers and their group"
    lora_linear_group(x, group)
    assert len(decided) == before and clock.runs == 0
    on_another_stream(monkeypatch, False)
    lora_linear_group(x, group)
    fake_backend.calls.clear()
    lora_linear_group(x, group)
    assert fake_backend.calls == ["group_forward"]


def test_remembered_choices_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    on_another_stream(monkeypatch)
    for M in range(1, 30):
        config_of(M)
    assert 0 < len(dispatch._routes) <= dispatch._MAX_ROUTES
    monkeypatch.setattr(dispatch._routes, "most", 5)
    for M in range(30, 60):
        config_of(M)
    assert len(dispatch._routes) <= 5
