"""Report: which layers of a model are fused, which are not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerStatus:
    """One adapter layer. reason says why it is not fused, None if it is.

    fused_calls and stock_calls (by reason) count its forward calls since it was accelerated;
    calls inside torch.compile are not counted.
    """

    name: str
    kind: str
    reason: str | None = None
    fused_calls: int = 0
    stock_calls: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class GroupStatus:
    """A parent module whose children may be computed together.

    groups: the names of its children that receive one input, in the order of their calls; None
    before that was observed. calls counts the groups computed as one, misses those of them that
    were computed in vain, alone the calls whose members were computed alone, by reason.
    """

    parent: str
    groups: tuple[tuple[str, ...], ...] | None
    calls: int = 0
    misses: int = 0
    alone: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Report:
    """The adapter layers of a model; print it to read it."""

    layers: tuple[LayerStatus, ...]
    notes: tuple[str, ...] = ()
    groups: tuple[GroupStatus, ...] = ()
    library: str = "PEFT"

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the layers that are fused."""
        return tuple(layer.name for layer in self.layers if layer.reason is None)

    @property
    def not_fused(self) -> dict[str, str]:
        """Name → reason of the layers that are not."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    @property
    def fused_calls(self) -> int:
        return sum(layer.fused_calls for layer in self.layers)

    @property
    def stock_calls(self) -> Counter[str]:
        """The calls left to the other library, by reason."""
        return sum((layer.stock_calls for layer in self.layers), Counter())

    @property
    def group_calls(self) -> int:
        """How often siblings on one input were computed as one group."""
        return sum(status.calls for status in self.groups)

    def __str__(self) -> str:
        if not self.layers:
            return "lora_fused: there are no adapter layers in this model"
        lines = [f"lora_fused: {len(self.fused)} of {len(self.layers)} adapter layers fused"]
        reasons: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.reason is not None:
                reasons.setdefault((layer.kind, layer.reason), []).append(layer.name)
        for (kind, reason), names in reasons.items():
            lines.append(f"    not fused: {len(names)} {kind}: {reason} ({_some(names)})")
        lines += [f"    note: {note}" for note in self.notes]
        lines += self._group_lines()
        if self.fused_calls or self.stock_calls:
            lines.append(f"    calls so far: {self.fused_calls} fused")
            for reason, count in self.stock_calls.most_common():
                lines.append(f"    calls so far: {count} by {self.library}: {reason}")
        return "\n".join(lines)

    def _group_lines(self) -> list[str]:
        """One line per kind of group, one per reason of members computed alone."""
        found: Counter[str] = Counter()
        alone: Counter[str] = Counter()
        for status in self.groups:
            found.update(", ".join(group) for group in status.groups or ())
            alone.update(status.alone)
        lines = [f"    one input: {names} (in {count} modules)" for names, count in found.items()]
        unknown = sum(status.groups is None for status in self.groups)
        if unknown:
            lines.append(f"    {unknown} modules: the first pass shows which layers get one input")
        if self.group_calls:
            lines.append(f"    calls so far: {self.group_calls} groups computed as one")
        for reason, count in alone.most_common():
            lines.append(f"    calls so far: {count} groups computed one by one: {reason}")
        return lines


def _some(names: list[str], most: int = 2) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
