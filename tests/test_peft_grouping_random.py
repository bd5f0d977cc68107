"""Random parents: whatever happens between the calls of siblings, the outputs are stock PEFT's."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from lora_fused.integrations import group_window
from lora_fused.integrations.peft import accelerate, explain
from tests.peft_groups import attention, parts_of

Event = Callable[[Any, dict[str, Any]], None]


def layer_in(parent: Any, state: dict[str, Any]) -> Any:
    return getattr(parent, state["name"])


def write_x(parent: Any, state: dict[str, Any]) -> None:
    state["x"].mul_(1.25)


def new_x(parent: Any, state: dict[str, Any]) -> None:
    state["x"] = state["x"] * 1.5


def write_lora_b(parent: Any, state: dict[str, Any]) -> None:
    layer_in(parent, state).lora_B["default"].weight.mul_(1.1)


def write_base(parent: Any, state: dict[str, Any]) -> None:
    layer_in(parent, state).base_layer.weight.add_(0.1)


def replace_data(parent: Any, state: dict[str, Any]) -> None:
    weight = layer_in(parent, state).lora_B["default"].weight
    weight.data = weight.data * 1.1


def replace_lora_a(parent: Any, state: dict[str, Any]) -> None:
    module = layer_in(parent, state).lora_A["default"]
    module.weight = torch.nn.Parameter(module.weight * 0.9)


def rescale(parent: Any, state: dict[str, Any]) -> None:
    layer_in(parent, state).scale_layer(1.1)


def other_adapter(parent: Any, state: dict[str, Any]) -> None:
    layer = layer_in(parent, state)
    layer.set_adapter("second" if layer.active_adapters == ["default"] else "default")


def both_adapters(parent: Any, state: dict[str, Any]) -> None:
    layer_in(parent, state).set_adapter(["default", "second"])


def switch(parent: Any, state: dict[str, Any]) -> None:
    layer = layer_in(parent, state)
    layer.enable_adapters(bool(layer.disable_adapters))


def merge(parent: Any, state: dict[str, Any]) -> None:
    layer = layer_in(parent, state)
    if layer.merged:
        layer.unmerge()
    elif not layer.disable_adapters:
        layer.merge()


def hook(parent: Any, state: dict[str, Any]) -> None:
    layer_in(parent, state).register_forward_hook(lambda m, a, y: y * 0.5)


def hook_inside(parent: Any, state: dict[str, Any]) -> None:
    layer_in(parent, state).lora_A["default"].register_forward_hook(lambda m, a, y: y * 0.5)


EVENTS: list[Event] = [
    write_x, new_x, write_lora_b, write_base, replace_data, replace_lora_a, rescale,
    other_adapter, both_adapters, switch, merge, hook, hook_inside,
]  # fmt: skip


def random_script(seed: int) -> Callable[[Any, Tensor], list[Tensor]]:
    """q, k and v in this order mostly, with an event between two of them now and then."""
    choices = random.Random(seed)
    names = [choices.choice("qkv") if choices.random() < 0.1 else name for name in "qkv"]
    steps: list[Any] = []
    for name in names:
        if choices.random() < 0.25:
            steps.append((choices.choice(EVENTS), choices.choice("qkv")))
        steps.append(name)

    def script(parent: Any, x: Tensor) -> list[Tensor]:
        state, ys = {"x": x.clone(), "name": ""}, []
        for step in steps:
            if isinstance(step, str):
                ys.append(getattr(parent, step)(state["x"]))
            else:
                event, state["name"] = step
                event(parent, state)
        return ys

    return script


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_parents(first: int) -> None:
    grouped = 0
    for seed in range(first, first + 20):
        torch.manual_seed(seed)
        model = attention()
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.double()
        stock = copy.deepcopy(model)
        accelerate(model, verbose=False, group="always")
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            x = torch.randn(4, 12, dtype=torch.float64)
            model(x)
            for call in range(6):
                for each in (model, stock):
                    parts_of(each).parent.script = random_script(100 * seed + call)
                for y, expected in zip(model(x), stock(x), strict=True):
                    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
                assert group_window.open_windows() == 0
        grouped += explain(model).group_calls
    assert grouped > 20
