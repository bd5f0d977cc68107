"""Siblings on one input are computed as one group: found, equal to members alone, and reported."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from lora_fused.integrations import grouping
from lora_fused.integrations.peft import Report, accelerate, accelerated, explain, restore
from tests.peft_groups import attention, learnt, parts_of
from tests.peft_models import (
    DRAWS,
    LLAMA_LAYERS,
    adapted,
    assert_close_together,
    draws_of,
    gpt2,
    llama,
    outputs_of,
    tokens,
)

LLAMA_GROUPS = {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}


def assert_grouped_equals_stock(model: nn.Module, context: Any = None, calls: int = 4) -> None:
    """The second pass of an accelerated copy, whose siblings are grouped, against stock PEFT."""
    contexts = {} if context is None else {"context": context}
    truth = draws_of(copy.deepcopy(model).double())
    baseline = draws_of(model, **contexts)
    fused = copy.deepcopy(model)
    accelerate(fused, verbose=False, group="always")
    outputs_of(fused, **contexts)
    assert explain(fused).group_calls == 0
    got = draws_of(fused, **contexts)
    report = explain(fused)
    assert report.group_calls == calls * DRAWS, str(report)
    assert report.fused_calls == (1 + DRAWS) * LLAMA_LAYERS, str(report)
    assert not any(status.alone or status.misses for status in report.groups), str(report)
    assert_close_together(got, truth, baseline)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias-all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 9},
        "alpha_pattern": {"up_proj": 3},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_to_stock(config: dict[str, Any], dtype: torch.dtype) -> None:
    assert_grouped_equals_stock(adapted(llama(dtype), **config))


def test_trainable_base_weights() -> None:
    model = adapted(llama())
    for p in model.parameters():
        p.requires_grad_()
    assert_grouped_equals_stock(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(dtype: torch.dtype) -> None:
    model = adapted(llama(dtype), adapter_dtype_of_base=False)
    assert_grouped_equals_stock(model, partial(torch.autocast, "cpu", torch.bfloat16))


def test_two_active_adapters() -> None:
    model = adapted(llama())
    second = copy.deepcopy(model.peft_config["default"])
    second.lora_alpha = 3
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    assert_grouped_equals_stock(model)


def test_what_is_found() -> None:
    model = adapted(llama())
    report = accelerate(model, verbose=False, group="always")
    assert "4 modules: the first pass shows which layers get one input" in str(report)
    for _ in range(3):
        model(tokens())
    report = explain(model)
    assert {group for status in report.groups for group in status.groups or ()} == LLAMA_GROUPS
    assert report.group_calls == 2 * len(report.groups) == 8
    assert "one input: q_proj, k_proj, v_proj (in 2 modules)" in str(report)
    assert "calls so far: 8 groups computed as one" in str(report)


def test_only_siblings_can_be_a_group() -> None:
    model = adapted(llama(), target_modules=["q_proj", "down_proj"])
    assert not accelerate(model, verbose=False, group="always").groups


def test_siblings_on_different_inputs_are_left_alone() -> None:
    """c_attn and c_proj are of one width; after a few passes it is clear that they are no group."""
    model = adapted(gpt2())
    assert len(accelerate(model, verbose=False, group="always").groups) == 2
    for _ in range(grouping.MOST_OBSERVATIONS + 1):
        model(tokens())
    assert not explain(model).groups
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_option() -> None:
    model = adapted(llama())
    with pytest.raises(ValueError, match="group is 'some', expected one of auto, always, never"):
        accelerate(model, verbose=False, group="some")
    assert not accelerate(model, verbose=False, group="never").groups
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_by_default_only_where_it_pays() -> None:
    model, x = attention(width=64, narrow=16), torch.randn(2, 300, 64)
    accelerate(model, verbose=False)
    for rows in (x, x, x[:, :9]):
        model(rows)
    with torch.no_grad():
        model(x)
        model(x.repeat(4, 1, 1))
    (status,) = explain(model).groups
    assert status.calls == 2
    assert dict(status.alone) == {
        "fewer than 512 tokens: a group was not measured faster": 1,
        "fewer than 2048 tokens: a group was not measured faster": 1,
    }
    assert "1 groups computed one by one: fewer than 512 tokens" in str(explain(model))


def test_wide_layers_gain_nothing_on_the_cpu() -> None:
    model, x = attention(width=16, narrow=20), torch.randn(600, 16)
    accelerate(model, verbose=False)
    for _ in range(2):
        model(x)
    (reason,) = explain(model).groups[0].alone
    assert "wider than their input" in reason


def test_dropout_is_left_alone() -> None:
    model, x = attention(lora_dropout=0.5), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    accelerate(model, verbose=False, group="always", match_torch_rng=True)
    for _ in range(2):
        torch.manual_seed(1)
        got = model(x)
    torch.manual_seed(1)
    for y, expected in zip(got, stock(x), strict=True):
        torch.testing.assert_close(y, expected)
    assert dict(explain(model).groups[0].alone) == {"q: each layer draws its own dropout mask": 1}
    model.eval()(x)
    assert explain(model).group_calls == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 2], ids=["one-by-one", "two-at-a-time"])
def test_gradient_checkpointing(reentrant: bool, passes: int) -> None:
    """Also where the pass that learns the groups is recomputed after they are known."""
    model = adapted(llama())
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    stock = copy.deepcopy(model).train()
    accelerate(model.train(), verbose=False, group="always")
    if not reentrant:
        assert_trains_like(model, stock, passes)
    model.eval()(tokens())  # without hooks: the groups become known
    before = explain(model).group_calls
    report = assert_trains_like(model.train(), stock, passes)
    alone = "saved-tensor hooks (checkpointing, offloading) were on before the groups were known"
    assert (alone in str(report)) != reentrant
    assert (report.group_calls > before) == reentrant, str(report)


@pytest.mark.parametrize("passes", [1, 2], ids=["one-by-one", "two-at-a-time"])
def test_groups_that_were_known_before_checkpointing(passes: int) -> None:
    model = adapted(llama())
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = copy.deepcopy(model).train()
    accelerate(model, verbose=False, group="always")
    with torch.no_grad():
        model(tokens())
    report = assert_trains_like(model.train(), stock, passes)
    attention, mlp = 2, 2
    assert report.group_calls >= 3 * passes * (attention + mlp)  # more, as far as recomputed
    assert not report.groups[0].alone, str(report)


def assert_trains_like(model: Any, stock: Any, passes: int) -> Report:
    """Three backward passes through the losses of several forward ones give equal gradients."""
    for _ in range(3):
        for each in (model, stock):
            each.zero_grad()
            losses = [each(tokens(), labels=tokens()).loss for _ in range(passes)]
            sum(losses).backward()
        for p, q in zip(model.parameters(), stock.parameters(), strict=True):
            if q.grad is not None:
                assert (p.grad - q.grad).abs().max() <= 1e-4 * q.grad.abs().max()
    report = explain(model)
    assert not any(status.misses for status in report.groups)
    return report


def test_backward_through_some_of_a_group() -> None:
    model, x = attention(), torch.randn(5, 12)
    stock = copy.deepcopy(model)
    learnt(model)
    for wanted in ([1], [0, 2], [2]):
        gradients = []
        for each in (model, stock):
            each.zero_grad()
            inputs = x.clone().requires_grad_()
            ys = each(inputs)
            sum(ys[i].square().sum() for i in wanted).backward()
            found = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
            gradients.append({"x": inputs.grad, **found})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4)
    assert explain(model).group_calls == 3


def test_outputs_may_be_written() -> None:
    model, x = attention(), torch.randn(5, 12)
    expected = [y * 2 for y in model(x)]
    learnt(model)
    for y, value in zip(model(x), expected, strict=True):
        y.mul_(2)
        torch.testing.assert_close(y, value)
        y.sum().backward(retain_graph=True)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_their_own_siblings(copied_by: Any) -> None:
    model, x = attention(), torch.randn(5, 12)
    learnt(model)
    twin = copied_by(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    expected = copy.deepcopy(twin)
    restore(expected)
    for y, value in zip(twin(x), expected(x), strict=True):
        torch.testing.assert_close(y, value)
    assert explain(twin).group_calls == 1 and explain(model).group_calls == 0
    restore(twin)
    assert grouping.siblings_of(parts_of(model).parent) is not None


def test_a_copied_layer_brings_no_siblings() -> None:
    model = attention()
    learnt(model)
    assert len(pickle.dumps(parts_of(model).q)) < 0.5 * len(pickle.dumps(model))


def test_compiled() -> None:
    torch._dynamo.reset()
    model, x = attention(), torch.randn(5, 12)
    expected = model(x)
    learnt(model)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for y, value in zip(compiled(x), expected, strict=True):
            torch.testing.assert_close(y, value)
    assert explain(model).group_calls == 0
    model(x)
    assert explain(model).group_calls == 1


def test_threads_have_windows_of_their_own() -> None:
    model = attention()
    stock = copy.deepcopy(model)
    learnt(model)
    both = threading.Barrier(2)
    wrong: list[BaseException] = []

    def calls(parent: Any, x: Tensor) -> list[Tensor]:
        q = parent.q(x)
        both.wait(10)
        return [q, parent.k(x), parent.v(x)]

    parts_of(model).parent.script = calls

    def work(seed: int) -> None:
        try:
            x = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))
            for _ in range(20):
                for y, value in zip(model(x), stock(x), strict=True):
                    torch.testing.assert_close(y, value)
        except BaseException as error:
            wrong.append(error)
            both.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert explain(model).groups[0].misses == 0 and explain(model).group_calls > 20


def test_hooks_come_and_go_with_the_layers() -> None:
    model, x = attention(), torch.randn(5, 12)
    parent = parts_of(model).parent
    learnt(model)
    accelerate(model, verbose=False, group="always")
    model(x)
    assert explain(model).group_calls == 1
    with accelerated(model, verbose=False, group="never"):
        assert not parent._forward_hooks
    model(x)
    assert explain(model).group_calls == 2
    merged = model.merge_and_unload()
    merged(x)
    assert not parent._forward_hooks and not parent._forward_pre_hooks
    assert not parent._forward_hooks_always_called
