"""What was computed ahead for a sibling is never used where it could be wrong, and never stays."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from lora_fused.integrations import group_window, grouping
from lora_fused.integrations.peft import accelerate, explain
from tests.peft_groups import attention, in_order, learnt, parts_of


def other_tensor(parent: Any, x: Tensor) -> list[Tensor]:
    return [parent.q(x), parent.k(x * 2), parent.v(x)]


def equal_tensor(parent: Any, x: Tensor) -> list[Tensor]:
    return [parent.q(x), parent.k(x.clone()), parent.v(x)]


def written_input(parent: Any, x: Tensor) -> list[Tensor]:
    x = x.clone()
    q = parent.q(x)
    with torch.no_grad():
        x.detach().mul_(2)
    return [q, parent.k(x), parent.v(x)]


def written_adapter(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    with torch.no_grad():
        parent.k.lora_B["default"].weight.mul_(1.5)
    return [q, parent.k(x), parent.v(x)]


def replaced_weight(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    base = parent.k.base_layer
    base.weight = torch.nn.Parameter(base.weight.detach() * 2, requires_grad=False)
    return [q, parent.k(x), parent.v(x)]


def other_scaling(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    parent.k.scale_layer(1.5)
    return [q, parent.k(x), parent.v(x)]


def disabled_sibling(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    parent.k.enable_adapters(False)
    try:
        return [q, parent.k(x), parent.v(x)]
    finally:
        parent.k.enable_adapters(True)


def merged_sibling(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    parent.k.merge()
    try:
        return [q, parent.k(x), parent.v(x)]
    finally:
        parent.k.unmerge()


def no_grad_sibling(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    with torch.no_grad():
        k = parent.k(x)
    return [q, k, parent.v(x)]


def autocast_sibling(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        k = parent.k(x)
    return [q, k, parent.v(x)]


def frozen_between(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    parent.k.lora_A["default"].weight.requires_grad_(False)
    return [q, parent.k(x), parent.v(x)]


def skipped_sibling(parent: Any, x: Tensor) -> list[Tensor]:
    return [parent.q(x), parent.q(x), parent.v(x)]


def hooked_between(parent: Any, x: Tensor) -> list[Tensor]:
    q = parent.q(x)
    handle = parent.k.lora_A["default"].register_forward_hook(lambda m, a, y: y * 3)
    k = parent.k(x)
    handle.remove()
    return [q, k, parent.v(x)]


WRITES = [written_input, written_adapter]  # no backward after these, in stock PEFT neither
SCRIPTS = [
    *WRITES, other_tensor, equal_tensor, replaced_weight, other_scaling,
    disabled_sibling, merged_sibling, no_grad_sibling, autocast_sibling, frozen_between,
    skipped_sibling, hooked_between,
]  # fmt: skip


def results(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients where there are any."""
    if not torch.is_grad_enabled():
        return {f"y{i}": y for i, y in enumerate(model(x))}
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    ys = model(inputs)
    sum(y.float().square().sum() for y in ys).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    kinds = {f"tracked {i}": torch.tensor(y.requires_grad) for i, y in enumerate(ys)}
    return {"x": inputs.grad, **{f"y{i}": y for i, y in enumerate(ys)}, **gradients, **kinds}


def assert_equal(model: Any, stock: Any, x: Tensor, tolerance: float = 1e-4) -> None:
    got, expected = results(model, x), results(stock, x)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_something_changes_between_siblings(script: Callable[..., Any]) -> None:
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)
    for each in (model, stock):
        parts_of(each).parent.script = script
    with warnings.catch_warnings(), torch.set_grad_enabled(script not in WRITES):
        warnings.simplefilter("ignore")
        assert_equal(model, stock, x, 0.1 if script is autocast_sibling else 1e-4)
    (status,) = explain(model).groups
    assert status.calls >= 1 and status.misses >= 1
    assert sum(status.alone.values()) == status.misses
    for each in (model, stock):
        parts_of(each).parent.script = in_order
    assert_equal(model, stock, x)


def test_after_some_misses_the_parent_is_left_alone() -> None:
    model, x = attention(), torch.randn(5, 12)
    learnt(model)
    for _ in range(grouping.MOST_MISSES + 2):
        parts_of(model).parent.script = other_tensor
        model(x)
        parts_of(model).parent.script = in_order
        model(x)
    (status,) = explain(model).groups
    assert (status.calls, status.misses, status.groups) == (3, grouping.MOST_MISSES, ())
    assert dict(status.alone) == {"k: called on another input than its siblings": 3}


def test_hooks_on_a_member() -> None:
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)
    for each in (model, stock):
        parts_of(each).k.register_forward_hook(lambda m, a, y: y * 2)
        parts_of(each).v.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    assert_equal(model, stock, x)
    assert dict(explain(model).groups[0].alone) == {"k: it has hooks": 1}


def test_another_adapter_on_a_member() -> None:
    model, x = attention(), torch.randn(5, 12)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    stock = copy.deepcopy(model)
    learnt(model)
    for each in (model, stock):
        parts_of(each).v.set_adapter("second")
    assert_equal(model, stock, x)
    assert dict(explain(model).groups[0].alone) == {
        "the layers have different adapters or options": 1
    }


def test_dropout_on_one_member() -> None:
    model, x = attention(lora_dropout=0.5).eval(), torch.randn(5, 12)
    learnt(model)
    parts_of(model).v.train()
    model(x)
    assert dict(explain(model).groups[0].alone) == {"v: each layer draws its own dropout mask": 1}


def test_inference_mode_is_left_alone() -> None:
    model, x = attention(), torch.randn(5, 12)
    learnt(model)
    with torch.inference_mode():
        model(x + 0)
        model(x)
    reason = "an inference tensor does not tell whether it was written"
    assert dict(explain(model).groups[0].alone) == {reason: 1}
    assert explain(model).group_calls == 1


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_recorded_calls_are_left_alone() -> None:
    model, x = attention(), torch.randn(5, 12)
    learnt(model)
    with Recorder():
        model(x)
    torch.func.vmap(lambda row: torch.cat(model(row)))(x)
    (reason,) = explain(model).groups[0].alone
    assert reason == "calls are recorded or transformed"
    assert explain(model).groups[0].alone[reason] == 2


def test_an_exception_between_siblings() -> None:
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)

    def raising(parent: Any, x: Tensor) -> list[Tensor]:
        parent.q(x)
        raise KeyError("between")

    parts_of(model).parent.script = raising
    with pytest.raises(KeyError, match="between"):
        model(x)
    assert group_window.open_windows() == 0
    parts_of(model).parent.script = in_order
    assert_equal(model, stock, x)
    assert_equal(model, stock, x)
    assert explain(model).groups[0].groups == (("q", "k", "v"),)


def test_an_interrupt_between_siblings() -> None:
    """It skips torch's hooks: the next call of the parent closes the window that was left open."""
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)

    def interrupted(parent: Any, x: Tensor) -> list[Tensor]:
        parent.q(x)
        raise KeyboardInterrupt

    parts_of(model).parent.script = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(x)
    parts_of(model).parent.script = in_order
    assert_equal(model, stock, x)
    assert group_window.open_windows() == 0


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept_after_the_parents_call(grad: bool) -> None:
    model, x = attention(), torch.randn(5, 12)
    learnt(model)
    parts_of(model).parent.script = lambda parent, x: [parent.q(x)]
    made: list[weakref.ref[Tensor]] = []
    compute = group_window.lora_linear_group

    def spy(*args: Any, **kwargs: Any) -> list[Tensor]:
        ys = compute(*args, **kwargs)
        made.extend(weakref.ref(y) for y in ys)
        return ys

    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
        patch.setattr(group_window, "lora_linear_group", spy)
        ys = model(x)
        gc.collect()
        assert [ref() is not None for ref in made] == [True, False, False]
    del ys
    assert "k, v: not called after its siblings" in explain(model).groups[0].alone


def test_a_parent_called_inside_itself() -> None:
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)

    def nested(parent: Any, x: Tensor) -> list[Tensor]:
        if x.shape[0] > 1:
            return [parent.q(x), *parent(x[:1]), parent.k(x), parent.v(x)]
        return in_order(parent, x)

    for each in (model, stock):
        parts_of(each).parent.script = nested
    assert_equal(model, stock, x)
    assert group_window.open_windows() == 0


def test_a_layer_called_twice_is_no_member() -> None:
    model, x = attention(), torch.randn(5, 12)
    parts_of(model).parent.script = lambda parent, x: [parent.q(x), parent.k(x), parent.q(x)]
    accelerate(model, verbose=False, group="always")
    for _ in range(grouping.MOST_OBSERVATIONS):
        model(x)
    assert explain(model).group_calls == 0 and not explain(model).groups[0].groups
    assert torch.equal(*model(x)[::2])


def test_a_checkpoint_groups_alike_in_both_passes() -> None:
    """Whatever is missed or learnt between a forward pass and its recomputation."""
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)
    siblings = grouping.siblings_of(parts_of(model).parent)
    for change in (siblings.miss, lambda why: siblings.learn([["k", "v"]]), siblings.miss):
        results = []
        for each in (model, stock):
            each.zero_grad()
            inputs = x.clone().requires_grad_()
            ys = checkpoint(each, inputs, use_reentrant=False)
            if each is model:
                change("a reason")
            sum(y.square().sum() for y in ys).backward()
            results.append([inputs.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # A recomputed forward ends inside its first group, which saves all that is asked for.
    assert explain(model).group_calls == 3 and siblings.misses == 2


def test_a_forward_that_ends_in_an_exception_missed_nothing() -> None:
    model, x = attention(), torch.randn(5, 12)
    learnt(model)
    parts = parts_of(model)

    def ends_early(parent: Any, x: Tensor) -> list[Tensor]:
        raise KeyError(parent.q(x).shape)

    parts.parent.script = ends_early
    with pytest.raises(KeyError):
        model(x)
    (status,) = explain(model).groups
    assert status.misses == 0 and status.groups == (("q", "k", "v"),)
