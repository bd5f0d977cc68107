"""Sibling layers that their parent calls on one input (q/k/v, gate/up), computed as one group.

Nothing is taken from names or source text. A parent with several LoRA children on inputs of one
width gets two forward hooks that open and close a window (see group_window) around each of its
calls. The first window observes the calls; later ones compute what was seen to belong together as
one group. A prediction that fails costs time, never a number: the sibling computes its own output,
the miss is counted, and the next window observes again. After MOST_MISSES of them the parent is
left alone.

What is computed ahead ends with the parent's call, by an exception too.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fused.integrations.group_window import can_join, close_window, open_window
from lora_fused.integrations.report import GroupStatus

GROUP_OPTIONS = ("auto", "always", "never")
MOST_MISSES = 3
MOST_OBSERVATIONS = 3
"""So many windows without a run, and there is none."""


@dataclass(eq=False)
class Siblings:
    """What is known about the children of one parent; its hooks are bound methods of this.

    Holds names, never modules, so that copies and pickles of the parent carry their own.
    groups: None until a window has observed the calls. alone counts why a known group did not
    run as one. fixed: the groups of calls under saved-tensor hooks (checkpointing, offloading), as
    they were known at the first such call and ever after: a recomputed forward must group exactly
    what the first one grouped, whatever was learnt or missed in between.
    """

    names: tuple[str, ...]
    always: bool = False
    groups: tuple[tuple[str, ...], ...] | None = None
    observations: int = 0
    calls: int = 0
    misses: int = 0
    alone: Counter[str] = field(default_factory=Counter)
    fixed: tuple[tuple[str, ...], ...] | None = None

    def groups_under_hooks(self) -> tuple[tuple[str, ...], ...]:
        """The groups of a call under saved-tensor hooks."""
        if self.fixed is None:
            self.fixed = self.groups or ()
        return self.fixed

    def open(self, parent: nn.Module, args: Any) -> None:
        """Forward pre-hook of the parent."""
        if torch.compiler.is_compiling():
            return
        there = sum(can_join(parent._modules.get(name)) for name in self.names)
        if there < 2 or (self.groups == () and self.misses == 0 and not self.fixed):
            detach(parent)
            return
        open_window(parent, self)

    def close(self, parent: nn.Module, args: Any, result: Any) -> None:
        """Forward hook of the parent, called whatever happened."""
        if torch.compiler.is_compiling():
            return
        window = close_window(parent)
        if window is None:
            return
        if result is None and sys.exc_info()[0] is not None:
            return  # checkpointing ends a recomputed forward so, as soon as it has what it needs
        if window.ready:
            self.miss(f"{', '.join(window.ready)}: not called after its siblings")
        elif window.runs:
            self.learn(window.runs)

    def learn(self, runs: list[list[str]]) -> None:
        """Remember the runs of two or more calls on one tensor, by children called once."""
        counts = Counter(name for run in runs for name in run)
        once = ([name for name in run if counts[name] == 1] for run in runs)
        groups = tuple(tuple(run) for run in once if len(run) > 1)
        self.observations += 1
        if groups or self.observations >= MOST_OBSERVATIONS:
            self.groups = groups

    def miss(self, why: str) -> None:
        """A group was computed in vain."""
        self.misses += 1
        self.alone[why] += 1
        self.groups = () if self.misses >= MOST_MISSES else None


def check(group: str) -> None:
    """Raises ValueError for an option that does not exist."""
    if group not in GROUP_OPTIONS:
        raise ValueError(f"group is {group!r}, expected one of {', '.join(GROUP_OPTIONS)}.")


def attach_all(model: nn.Module, group: str) -> None:
    """Open a window around each call of every parent whose children may form groups.

    What was learnt of a parent before is kept where its children are the same.
    """
    for parent in model.modules():
        before = siblings_of(parent)
        detach(parent)
        children = _candidates(parent)
        widths = Counter(child.in_features for child in children.values())
        names = tuple(n for n, child in children.items() if widths[child.in_features] > 1)
        if names and group != "never":
            kept = before is not None and before.names == names
            siblings = before if before is not None and kept else Siblings(names)
            siblings.always = group == "always"
            siblings.fixed = None
            put_back(parent, siblings)


def put_back(parent: nn.Module, siblings: Siblings | None) -> None:
    """Have these hooks, or none, on a module."""
    detach(parent)
    if siblings is not None:
        parent.register_forward_pre_hook(siblings.open)
        parent.register_forward_hook(siblings.close, always_call=True)


def detach(parent: nn.Module) -> None:
    """Take the hooks away again."""
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if _owner(hook) is not None]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def siblings_of(parent: nn.Module) -> Siblings | None:
    """What attach has put on a module."""
    owners = (_owner(hook) for hook in parent._forward_pre_hooks.values())
    return next((owner for owner in owners if owner is not None), None)


def statuses(model: nn.Module) -> tuple[GroupStatus, ...]:
    """What every parent in a model has learnt and done."""
    found = ((name, siblings_of(parent)) for name, parent in model.named_modules())
    return tuple(
        GroupStatus(name, s.groups, s.calls, s.misses, s.alone.copy())
        for name, s in found
        if s is not None
    )


def _owner(hook: Any) -> Siblings | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Siblings) else None


def _candidates(parent: nn.Module) -> dict[str, Any]:
    return {n: child for n, child in parent._modules.items() if can_join(child)}
