"""torch.compile and CUDA graphs: one graph for every M, no look at values on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lora_fused import FusedLoRALinear, gpu_tuning
from lora_fused.autograd import Saved, lora_backward, lora_forward
from lora_fused.config import Call, Config, Mask, Problem, Route
from lora_fused.devices import DEVICES
from tests import fake_backend
from tests.gpu_double import Clock, pretended_gpu

NEEDS = frozenset({"x", "lora_A", "lora_B"})


@pytest.fixture(params=["cpu", "gpu"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[str]:
    """The CPU's backends, and the fake backend of a pretended GPU."""
    torch._dynamo.reset()
    if request.param == "cpu":
        yield "cpu"
        return
    monkeypatch.setenv("LORA_FUSED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(1.0, shrink_matmul=0.1))
    with pretended_gpu():
        yield "gpu"


def layer_with_adapter(**options: object) -> FusedLoRALinear:
    layer = FusedLoRALinear(64, 48, r=5, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("dynamic", "sizes_until_settled"), [(True, 1), (None, 2)])
def test_no_graph_is_made_for_another_number_of_tokens(
    device: str, dropout: float, dynamic: bool | None, sizes_until_settled: int
) -> None:
    """dynamic=None: torch makes a second, dynamic graph when the size first changes."""
    layer = layer_with_adapter(lora_dropout=dropout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    for tokens in (5, 24, 33, 64, 17, 300, 9):
        x = torch.randn(2, tokens, 64, requires_grad=True)
        y = compiled(x)
        y.square().mean().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()
        if not dropout:
            torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert set(graphs[sizes_until_settled - 1 :]) == {2}, f"graphs after each size: {graphs}"
    if device == "gpu":
        assert "shrink_matmul forward" in fake_backend.calls


def test_a_padded_s_keeps_the_layout_the_compiler_expects(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fake_backend.shrink_matmul

    def padded(*args):  # type: ignore[no-untyped-def]
        y, s = original(*args)
        rows = s.new_zeros(s.shape[0], s.shape[1] + 3)
        rows[:, : s.shape[1]] = s
        return y, rows[:, : s.shape[1]]

    monkeypatch.setattr(fake_backend, "shrink_matmul", padded)
    layer, x = layer_with_adapter(), torch.randn(24, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", ["", "seed", "drawn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_library_never_waits_for_a_gpu(dropout: str, dtype: torch.dtype) -> None:
    """Meta tensors have no values: whatever looks at one on the host raises here."""
    M, K, N, R = 24, 64, 48, 16
    problem = Problem(
        M, K, N, R, dtype, "cuda", dropout=bool(dropout), needs=NEEDS, device=DEVICES["H100"]
    )
    route = Route(problem, Config("torch"), dtype, False, NEEDS, (M, K), (M, N), (dtype,) * 4)
    with torch.no_grad():
        x, weight, lora_A, lora_B, bias, dy = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((M, K), (N, K), (R, K), (N, R), (N,), (M, N))
        )
        mask = keep = None
        if dropout == "seed":
            mask = Mask(torch.empty((), dtype=torch.int64, device="meta"), 6554)
        elif dropout == "drawn":
            keep = torch.empty(M, K, dtype=torch.bool, device="meta").bernoulli_(0.9)
        call = Call(route, 2.0, mask, keep=keep)
        y, s = lora_forward(call, x, weight, lora_A, lora_B, bias)
        gradients = lora_backward(call, dy, Saved(x, s, weight, lora_A, lora_B))
        assert y.shape == (M, N) and y.device.type == "meta"
        assert gradients.dx is not None and gradients.dx.shape == (M, K)
