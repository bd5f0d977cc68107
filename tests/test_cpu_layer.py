"""One native call for a whole direction: the bits of the operations apart, and what it refuses."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fused import FusedLoRALinear
from lora_fused.autograd import Saved, lora_backward, lora_forward
from lora_fused.backends import cpu
from lora_fused.config import Call, Config, Mask
from lora_fused.dispatch import forcing, route_for
from tests.native import ISAS, each_dtype, each_isa, module, needs_native

pytestmark = needs_native

NEEDS = ("x", "lora_A", "lora_B")
SIZES = [(1, 1, 1, 1), (1, 40, 24, 4), (4, 33, 70, 3), (17, 130, 65, 9), (700, 48, 600, 16)]


@pytest.fixture(params=[True, False], ids=["exchange API", "methods"])
def reading(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Tensors are read by DLPack's exchange API, or as where torch has none."""
    if not request.param:
        module().bind_torch(object, object)
    yield request.param
    module().bind_torch(Tensor, nn.Parameter)


@pytest.fixture
def isa_in_use(isa: str) -> Iterator[str]:
    with forcing(Config("cpu", "own", "own", isa, 1)):
        yield isa


def normal(*shape: int, dtype: torch.dtype, layout: str = "row") -> Tensor:
    if layout == "column":
        return torch.randn(*reversed(shape), dtype=dtype).t()
    if layout == "gaps":
        return torch.randn(shape[0], shape[1] + 3, dtype=dtype)[:, : shape[1]]
    return torch.randn(*shape, dtype=dtype)


def outputs(call: Call, tensors: tuple[Any, ...], dy: Tensor) -> dict[str, Tensor | None]:
    x, w, a, b, bias = tensors
    y, s = lora_forward(call, x, w, a, b, bias)
    dx, _, da, db, _ = lora_backward(call, dy, Saved(x, s, w, a, b))
    return {"y": y, "s": s, "dx": dx, "da": da, "db": db}


def assert_same_bits(call: Call, tensors: tuple[Any, ...], dy: Tensor) -> None:
    route = call.route
    assert route.forward_layer is not None and route.backward_layer is not None
    apart = call._replace(route=replace(route, forward_layer=None, backward_layer=None))
    got, want = outputs(call, tensors, dy), outputs(apart, tensors, dy)
    for name, tensor in want.items():
        other = got[name]
        if tensor is None or other is None:
            assert tensor is other, name
        else:
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
            assert torch.equal(tensor, other), name
    y, _ = lora_forward(call, *tensors, wants_s=False)
    assert torch.equal(y, got["y"])


@each_isa
@each_dtype
@pytest.mark.parametrize("M, K, N, R", SIZES)
@pytest.mark.parametrize("mask", [None, Mask(7, 20000)], ids=["plain", "dropout"])
def test_same_bits_as_the_operations_apart(
    isa_in_use: str, reading: bool, dtype: torch.dtype, mask: Any,
    M: int, K: int, N: int, R: int,
) -> None:  # fmt: skip
    torch.manual_seed(3)
    for layout, bias in itertools.product(("row", "column", "gaps"), (False, True)):
        x, w = normal(M, K, dtype=dtype, layout=layout), normal(N, K, dtype=dtype, layout=layout)
        a, b = normal(R, K, dtype=dtype, layout=layout), normal(N, R, dtype=dtype, layout=layout)
        tensors = (x, w, a, b, torch.randn(2 * N, dtype=dtype)[::2] if bias else None)
        route = route_for(*tensors, mask is not None, "cpu", needs=frozenset(NEEDS))
        dy = normal(M, N, dtype=dtype, layout=layout)
        assert_same_bits(Call(route, 1.5, mask), tensors, dy)


@pytest.mark.parametrize("count", range(4))
def test_only_the_wanted_gradients(count: int, reading: bool) -> None:
    tensors = (torch.randn(2, 5, 24), torch.randn(40, 24), torch.randn(3, 24), torch.randn(40, 3))
    for needs in itertools.combinations(NEEDS, count):
        route = route_for(*tensors, None, True, "cpu", needs=frozenset(needs))
        call = Call(route, 0.5, Mask(9, 9000))
        assert_same_bits(call, (*tensors, None), torch.randn(2, 5, 40))
        got = outputs(call, (*tensors, None), torch.randn(2, 5, 40))
        wanted = {"x": "dx", "lora_A": "da", "lora_B": "db"}
        assert {got[wanted[name]] is not None for name in needs} <= {True}
        assert all(got[wanted[name]] is None for name in NEEDS if name not in needs)


def test_adapters_of_another_dtype_and_a_packed_weight(reading: bool) -> None:
    w = torch.randn(64, 96, dtype=torch.bfloat16)
    packed = cpu.pack(w, 1)
    for adapter_dtype in (torch.bfloat16, torch.float32, torch.float64):
        a, b = torch.randn(4, 96, dtype=adapter_dtype), torch.randn(64, 4, dtype=adapter_dtype)
        x = torch.randn(33, 96, dtype=torch.bfloat16)
        route = route_for(x, w, a, b, None, False, "cpu", packed, needs=frozenset(NEEDS))
        call = Call(route, 1.0, None, packed)
        assert_same_bits(call, (x, w, a, b, None), torch.randn(33, 64, dtype=torch.bfloat16))


def test_an_expanded_gradient() -> None:
    layer = FusedLoRALinear(24, 40, r=4)
    x = torch.randn(3, 7, 24, requires_grad=True)
    (by_sum,) = torch.autograd.grad(layer(x).sum(), x)
    (by_ones,) = torch.autograd.grad(layer(x), x, torch.ones(3, 7, 40))
    assert torch.equal(by_sum, by_ones)


LAYER: dict[str, Any] = dict(isa="", dtype=0, M=0, N=0, K=0, R=0, da_dtype=0, db_dtype=0, threads=1)
BAD: list[tuple[str, Any, str]] = [
    ("isa", "sse2", f"isa: got 'sse2', expected one that this CPU runs: {', '.join(ISAS)}"),
    *((name, 3, "dtype: got code 3, expected 0 (fp32), 1 (bf16) or 2 (fp16)")
      for name in ("dtype", "da_dtype", "db_dtype")),
    *((name, -1, "sizes: got a negative one, expected all >= 0") for name in "MNKR"),
    ("threads", 0, "threads: got 0, expected at least 1"),
]  # fmt: skip


def layer_of(**changed: Any) -> Any:
    return module().Layer(*{**LAYER, "isa": ISAS[-1], **changed}.values())


@pytest.mark.parametrize("argument, value, sentence", BAD)
def test_bad_sizes_are_refused_in_one_sentence(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        layer_of(**{argument: value})


def test_empty_problems_and_bad_calls(reading: bool) -> None:
    layer, t = layer_of(), torch.empty(0, 0)
    layer.forward(t, t, t, t, None, 0, 1.0, 0, 0, None, t)
    layer.backward(t, t, t, t, t, t, 0, 1.0, 0, 0, t, t, t)
    sentence = "threshold: got 65537, expected 0 to 65536"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        layer.forward(t, t, t, t, None, 0, 1.0, 0, 65537, None, t)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        layer.backward(t, t, t, t, t, t, 0, 1.0, 0, 65537, t, t, t)
    with pytest.raises(RuntimeError, match="data pointer of Tensor that doesn't have storage"):
        layer.forward(t.to_sparse(), t, t, t, None, 0, 1.0, 0, 0, None, t)


def test_other_threads_run_during_a_call() -> None:
    """The interpreter's lock is given back: a thread counts while one call computes."""
    M, K = 1024, 1024
    x, w, a, b = (torch.randn(*shape) for shape in ((M, K), (K, K), (8, K), (K, 8)))
    dy, s, y, da, db = (torch.randn(*t) for t in ((M, K), (M, 8), (M, K), (8, K), (K, 8)))
    layer = layer_of(M=M, N=K, K=K, R=8)
    done, counted = threading.Event(), [0]

    def count() -> None:
        while not done.is_set():
            counted[0] += 1
            time.sleep(0)

    def counts_during(call: Callable[[], None]) -> int:
        before = counted[0]
        call()
        return counted[0] - before

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for call in (
            lambda: layer.forward(x, w, a, b, None, 0, 1.0, 0, 0, s, y),
            lambda: layer.backward(dy, x, s, w, a, b, 0, 1.0, 0, 0, y, da, db),
        ):
            # A held lock lets the thread run once at most, before the call begins.
            assert any(counts_during(call) > 10 for _ in range(200))
    finally:
        done.set()
        thread.join()


def test_facts_tell_apart_what_choices_depend_on() -> None:
    w, a, b = torch.randn(6, 6), torch.randn(2, 6), torch.randn(6, 2)
    x = torch.randn(3, 6)
    others = [
        x[:2], x.double(), x.clone().requires_grad_(), nn.Parameter(x, requires_grad=False),
        torch._neg_view(x), x[None],
    ]  # fmt: skip
    facts = module().facts
    keys = [facts(t, w, a, b, None) for t in [x, *others]]
    keys += [facts(x, w.t(), a, b, None), facts(x, w, a, b, torch.randn(6))]
    keys += [facts(x, w, None, None, None)]
    assert len(set(keys)) == len(keys) and (None not in keys or set(keys) == {None})
    assert facts(torch.randn(3, 6), w, a, b, None) == keys[0]


def test_what_is_not_plain_has_no_native_facts() -> None:
    class Subclass(Tensor):
        pass

    x, w = torch.randn(3, 6), torch.randn(6, 6)
    for other in (x.to_sparse(), x.to("meta"), x.as_subclass(Subclass)):
        assert module().facts(other, w, None, None, None) is None
