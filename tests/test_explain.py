"""explain() says what really happens."""

import pytest
import torch
from torch import nn

from lora_fused import FusedLoRALinear, dispatch, explain
from lora_fused.backends import cpu
from lora_fused.config import Config, Problem
from tests.conftest import native_isas

needs_native = pytest.mark.skipif(not native_isas(), reason="this CPU runs no native kernels")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = FusedLoRALinear(16, 32, r=4, lora_dropout=0.5)
        self.down = FusedLoRALinear(32, 16, r=4)
        self.idle = FusedLoRALinear(16, 16, r=4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * scale


def test_layer_on_torch() -> None:
    layer = FusedLoRALinear(16, 32, r=4, backend="torch")
    report = explain(layer, torch.randn(2, 5, 16))
    (only,) = report.layers
    assert only.config.backend == "torch" and only.problem.M == 10
    text = str(report)
    assert "for      M=10 K=16 N=32 R=4 float32 on cpu" in text
    assert "runs on  torch: forward library, dx library" in text


@needs_native
def test_layer_on_native_kernels() -> None:
    layer = FusedLoRALinear(16, 32, r=4)
    (before,) = explain(layer).layers
    assert before.config == dispatch.choose(before.problem)
    assert before.problem.M == 512 and before.problem.needs == {"x", "lora_A", "lora_B", "bias"}
    assert f"cpu ({native_isas()[-1]}," in str(before)
    (after,) = explain(layer.prepack()).layers
    assert after.problem.prepacked and layer.prepacked and "prepack()" not in str(after)


@needs_native
@pytest.mark.parametrize("worth_it", [True, False])
def test_whether_packing_is_worth_it(monkeypatch: pytest.MonkeyPatch, worth_it: bool) -> None:
    def choose_cpu(problem: Problem, info: cpu.CpuInfo) -> Config:
        strategy = "packed" if problem.prepacked and worth_it else "own"
        return Config("cpu", strategy, strategy, info.isa)

    monkeypatch.setattr(dispatch, "choose_cpu", choose_cpu)
    dispatch.forget_choices()
    layer = FusedLoRALinear(16, 32, r=4)
    advice = "prepack() would let the native GEMM read the weight faster"
    assert (advice in str(explain(layer))) == worth_it
    unread = "the packed weight is not read: at this size the plain one is faster"
    assert (unread in str(explain(layer.prepack()))) != worth_it
    assert advice not in str(explain(layer))


def test_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu: there are no native kernels for float64" in str(
        explain(FusedLoRALinear(8, 8).double())
    )
    monkeypatch.setattr(cpu, "native", lambda: None)
    dispatch.forget_choices()
    assert "cpu: the native kernels are not built" in str(explain(FusedLoRALinear(8, 8)))


def test_model_with_an_input() -> None:
    model, x = Model(), torch.randn(3, 16)
    state = torch.get_rng_state()
    report = explain(model, x)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    up, down, idle = report.layers
    assert (up.name, up.problem.M, up.problem.K, up.problem.dropout) == ("up", 3, 16, True)
    assert (down.name, down.problem.M, down.problem.K) == ("down", 3, 32)
    assert idle.problem is None and "it was not called" in str(idle)
    assert not model.up._forward_pre_hooks
    assert str(explain(model, (x, 2.0))) == str(explain(model, {"x": x})) == str(report)


def test_model_without_an_input_and_without_layers() -> None:
    assert [layer.problem.M for layer in explain(Model()).layers] == [512] * 3
    assert str(explain(nn.Linear(3, 3))) == "no FusedLoRALinear in this module"


def test_merged_and_rank_zero() -> None:
    layer = FusedLoRALinear(16, 32, r=4)
    layer.merge()
    assert "the adapter is merged" in str(explain(layer))
    assert "r = 0: there is no adapter" in str(explain(FusedLoRALinear(16, 32, r=0)))


def test_autocast_and_gradient_mode_are_respected() -> None:
    layer = FusedLoRALinear(16, 32, r=4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (only,) = explain(layer, torch.randn(3, 16)).layers
    assert only.problem.dtype == torch.bfloat16 and only.problem.adapter_dtype == torch.float32
    assert only.problem.needs == frozenset()


def test_bad_input_gives_the_layers_own_error() -> None:
    with pytest.raises(ValueError, match="x has shape"):
        explain(FusedLoRALinear(16, 32, r=4), torch.randn(3, 15))
