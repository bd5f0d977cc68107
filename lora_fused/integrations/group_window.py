"""One call of a parent module: the window in which its children's calls are seen and grouped.

A window belongs to one thread. It observes which children are called one after another on the very
same tensor, or, once that is known, lets the first child of such a run compute the whole run by
lora_linear_group. A sibling takes its own output if, and only if, its call would compute the same:
same tensor object, same version, same parameters, same modes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.functional import is_traced
from lora_fused.group import LoRAWeights, lora_linear_group
from lora_fused.integrations.grouping_rule import why_it_does_not_pay, why_too_few_tokens

if TYPE_CHECKING:
    from lora_fused.integrations.grouping import Siblings

_NOT_BEFORE_HOOKS = (
    "saved-tensor hooks (checkpointing, offloading) were on before the groups were known: "
    "one pass without them, as in torch.no_grad(), then accelerate"
)
_local = threading.local()  # .top: the innermost open window of this thread


class Member(NamedTuple):
    """A layer as a member of a group: its operands, and all that its output depends on but x."""

    weights: LoRAWeights
    backend: str
    adapters: tuple[str, ...]
    facts: tuple[Any, ...]


class _Ready(NamedTuple):
    """An output computed ahead, and for what."""

    y: Tensor
    x: Tensor
    facts: tuple[Any, ...]


def facts_of(tensors: Iterable[Tensor | None], *others: Any) -> tuple[Any, ...]:
    """Identity, memory, version and requires_grad of tensors, and whatever else decides the output.

    NOTE: what is written past autograd (x.data.mul_(2)) changes none of them.
    """
    of_each = (None if t is None else (id(t), t.data_ptr(), _version(t), t.requires_grad)
               for t in tensors)  # fmt: skip
    return (*of_each, *others)


def _version(t: Tensor) -> int | None:
    """How often a tensor was written; None for an inference tensor, which does not count."""
    return None if t.is_inference() else t._version


def _modes(x: Tensor) -> tuple[Any, ...]:
    """What else than tensors decides the output of a layer."""
    kind = x.device.type
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind)
    return (torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if autocast else None)


def can_join(module: Any) -> bool:
    """Whether a module is a LoRA layer that can be a member of a group."""
    return hasattr(type(module), "as_member")


def open_window(parent: nn.Module, siblings: Siblings) -> None:
    """Begin a call of a parent. One that was left open, by an interrupt, ends here."""
    close_window(parent)
    _local.top = Window(parent, siblings, getattr(_local, "top", None))


def close_window(parent: nn.Module) -> Window | None:
    """Take the window of a parent off this thread's stack, and those opened in it."""
    window = getattr(_local, "top", None)
    while window is not None and window.parent is not parent:
        window = window.outer
    if window is not None:
        _local.top = window.outer
    return window


def open_windows() -> int:
    """How many windows are open in this thread: 0 outside of any parent's call."""
    window, count = getattr(_local, "top", None), 0
    while window is not None:
        window, count = window.outer, count + 1
    return count


def call_in_group(layer: Any, x: Tensor) -> Tensor | None:
    """The output of a layer by its group; None if it has to compute its own."""
    window = getattr(_local, "top", None)
    return None if window is None else window.call(layer, x)


class Window:
    """One call of a parent, in one thread."""

    __slots__ = ("last", "observes", "outer", "parent", "ready", "runs", "siblings")

    def __init__(self, parent: nn.Module, siblings: Siblings, outer: Window | None) -> None:
        self.parent, self.siblings, self.outer = parent, siblings, outer
        self.observes = siblings.groups is None
        self.runs: list[list[str]] = []
        self.last: tuple[weakref.ref[Tensor], int | None] | None = None
        self.ready: dict[str, _Ready] = {}

    def call(self, layer: Any, x: Tensor) -> Tensor | None:
        name = self._name_of(layer)
        if name is None:
            return None
        groups = self.siblings.groups
        if torch.is_grad_enabled() and _saved_tensor_hooks_are_on():
            groups = self._groups_under_hooks(name)
        if self.observes:
            self._observe(name, x)
        if name in self.ready:
            return self._take(name, x)
        for group in groups or ():
            if group[0] == name:
                return self._lead(group, x)
        return None

    def _groups_under_hooks(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The groups that both passes of a checkpoint agree on."""
        groups = self.siblings.groups_under_hooks()
        if any(group[0] == name and group not in groups for group in self.siblings.groups or ()):
            self.siblings.alone[_NOT_BEFORE_HOOKS] += 1
        return groups

    def _observe(self, name: str, x: Tensor) -> None:
        """Note a call: in the run of the last one if it is on the same, unchanged tensor."""
        last, self.last = self.last, (weakref.ref(x), _version(x))
        if last is not None and last[0]() is x and last[1] == self.last[1]:
            self.runs[-1].append(name)
        else:
            self.runs.append([name])

    def _name_of(self, layer: Any) -> str | None:
        modules = self.parent._modules
        for name in self.siblings.names:
            if modules.get(name) is layer:
                return name
        return None

    def _lead(self, group: tuple[str, ...], x: Tensor) -> Tensor | None:
        """Compute the whole group and keep the outputs of the siblings."""
        why = (None if self.siblings.always else why_too_few_tokens(x)) or _why_alone(x)
        members: list[Member] = []
        for name in group if why is None else ():
            member = self._member(name, x)
            if isinstance(member, str):
                why = f"{name}: {member}"
                break
            members.append(member)
        if why is None and any(m[1:3] != members[0][1:3] for m in members):
            why = "the layers have different adapters or options"
        if why is None and not self.siblings.always:
            why = why_it_does_not_pay(x, [m.weights for m in members])
        if why is not None:
            self.siblings.alone[why] += 1
            return None
        backend = members[0].backend
        ys = lora_linear_group(x, [m.weights for m in members], backend=backend)
        self.siblings.calls += 1
        around = facts_of([x], _modes(x))
        for name, member, y in zip(group[1:], members[1:], ys[1:], strict=True):
            self.ready[name] = _Ready(y, x, (around, member.facts))
        return ys[0]

    def _member(self, name: str, x: Tensor) -> Member | str:
        layer: Any = self.parent._modules.get(name)
        if not can_join(layer):
            return "it is not accelerated any more"
        if (
            layer._forward_hooks or layer._forward_pre_hooks
            or layer._backward_hooks or layer._backward_pre_hooks
        ):  # fmt: skip
            return "it has hooks"
        if "forward" in layer.__dict__:
            return "its forward is patched"
        member: Member | str = layer.as_member(x)
        return member

    def _take(self, name: str, x: Tensor) -> Tensor | None:
        """The output computed ahead, if it is what this call would compute."""
        ready = self.ready.pop(name)
        if ready.x is not x:
            self.siblings.miss(f"{name}: called on another input than its siblings")
            return None
        member = self._member(name, x)
        around = facts_of([x], _modes(x))
        if isinstance(member, str) or ready.facts != (around, member.facts):
            self.siblings.miss(f"{name}: something changed after its siblings were called")
            return None
        return ready.y


def _why_alone(x: Tensor) -> str | None:
    """Why no group may be computed for this input, whatever its members are."""
    if is_traced() or torch._C._are_functorch_transforms_active():
        return "calls are recorded or transformed"
    if x.is_inference():
        return "an inference tensor does not tell whether it was written"
    return None


def _saved_tensor_hooks_are_on() -> bool:
    """Whether saved tensors are checkpointed or offloaded.

    NOTE: checkpointing compares what a recomputed forward saves with what the first one saved. A
    group saves other tensors than its members alone, so that both passes must know it or none.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
