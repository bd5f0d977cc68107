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
class Report:
    """The adapter layers of a model; print it to read it."""

    layers: tuple[LayerStatus, ...]
    notes: tuple[str, ...] = ()

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
        if self.fused_calls or self.stock_calls:
            lines.append(f"    calls so far: {self.fused_calls} fused")
            for reason, count in self.stock_calls.most_common():
                lines.append(f"    calls so far: {count} by PEFT: {reason}")
        return "\n".join(lines)


def _some(names: list[str], most: int = 2) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
