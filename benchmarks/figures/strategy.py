"""Strategy maps: one coloured cell, with a letter, per rank and number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.patches import Patch

from benchmarks.figures.panel import data_uri, panel
from benchmarks.strategy import StrategyMap

# (letter, colour) of every strategy that a backend can have; Triton's in small and lighter.
_LOOKS = {
    "library": ("L", "#dfe3e8"),
    "own": ("O", "#a9c9e8"),
    "packed": ("P", "#a5dccb"),
    "hybrid": ("H", "#f0d9a8"),
    "split": ("S", "#a9c9e8"),
    "s_first": ("F", "#6ea8dc"),
    "one_pass": ("P", "#b9b3e3"),
    "decode": ("D", "#a5dccb"),
}


def strategy_maps(found: StrategyMap) -> list[str]:
    """A figure for forward and one for dx, or one for both where they are the same."""
    if found.forward == found.dx:
        return [_map(found, "forward and dx", found.forward)]
    return [_map(found, "forward", found.forward), _map(found, "dx", found.dx)]


def _map(found: StrategyMap, direction: str, cells: Sequence[Sequence[str]]) -> str:
    title = f"{found.device}, {found.dtype}, {direction}"
    figure, axes = panel(title + (": modelled" if found.modelled else ""), 1.35 + 0.26 * len(cells))
    names = list(dict.fromkeys(cell for row in cells for cell in row))
    looks = {name: _look(name) for name in names}
    axes.imshow(
        [[names.index(cell) for cell in row] for row in cells], aspect="auto", origin="lower",
        cmap=ListedColormap([color for _, color in looks.values()]), vmin=-0.5,
        vmax=len(names) - 0.5,
    )  # fmt: skip
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            axes.text(j, i, looks[cell][0], ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(found.tokens)), [str(M) for M in found.tokens])
    axes.set_yticks(range(len(found.ranks)), [str(R) for R in found.ranks])
    axes.set_xlabel("tokens M", fontsize=9)
    axes.set_ylabel("rank R", fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    handles = [Patch(color=color, label=f"{letter}  {n}") for n, (letter, color) in looks.items()]
    figure.legend(
        handles=handles, fontsize=8, frameon=False, ncols=3, loc="outside lower center",
        handlelength=1.2,
    )  # fmt: skip
    return data_uri(figure)


def _look(name: str) -> tuple[str, str]:
    letter, color = _LOOKS[name.split()[-1]]
    if not name.startswith("triton "):
        return letter, color
    red, green, blue = (1 - 0.5 * (1 - c) for c in to_rgb(color))
    return letter.lower(), to_hex((red, green, blue))
