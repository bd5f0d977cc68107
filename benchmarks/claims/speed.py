"""Ratios of times: inference latency (table 1), training throughput (4.2), task switching (4.2).

GPT-2 medium's blocks, a few of them: all blocks are alike, and ratios do not depend on how many
there are. Variants meet in the same rounds; medians of the ratios within a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import loralib
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import lora_fused.loralib
from benchmarks.claims import models
from benchmarks.claims.claim import Claim
from benchmarks.timing import (
    Clock,
    clock_for,
    elapsed_ns,
    interleaved,
    pace_of,
    paired_ratio,
)
from lora_fused.backends import cpu

ROUNDS = 9
RANK = 4


class Point(NamedTuple):
    """One column of table 1: its sizes, adapter bottlenecks, and what the paper measured."""

    batch: int
    sequence: int
    adapter_l: int
    adapter_h: int
    paper_l: float
    paper_h: float
    layers: int
    rounds: int


# |Θ| = 0.5 M is a bottleneck of 9 (L) and 5 (H) in 24 blocks, 11 M one of 224 and 112.
TABLE_1 = (
    Point(32, 512, 9, 5, 1.022, 1.030, layers=1, rounds=5),
    Point(16, 256, 224, 112, 1.050, 1.084, layers=1, rounds=9),
    Point(1, 128, 224, 112, 1.207, 1.303, layers=4, rounds=15),
)


def dtype_here() -> torch.dtype:
    """bf16 where the CPU multiplies it, else fp32."""
    return torch.bfloat16 if cpu.isa() in ("avx512_bf16", "amx_bf16") else torch.float32


def inference(threads: int = 1) -> list[Claim]:
    """Time over the merged model's, at the three points of table 1."""
    return [claim for point in TABLE_1 for claim in _at(point, clock_for(threads))]


def _at(point: Point, clock: Clock) -> list[Claim]:
    h = torch.randn(point.batch, point.sequence, models.GPT2_MEDIUM.n_embd, dtype=dtype_here())
    variants: dict[str, tuple[str, nn.Module]] = {
        "merged": ("1 (by construction)", _blocks(point.layers)),
        "Adapter-L": (
            f"{point.paper_l:.3f}",
            models.add_adapters_l(_blocks(point.layers), point.adapter_l),
        ),
        "Adapter-H": (
            f"{point.paper_h:.3f}",
            models.add_adapters_h(_blocks(point.layers), point.adapter_h),
        ),
        "LoRA unmerged, loralib": ("none", models.add_lora(_blocks(point.layers), RANK, loralib)),
        "LoRA unmerged, lora_fused": ("none", models.add_lora(_blocks(point.layers), RANK)),
    }
    ratios = _against_first(
        {name: _forward(model.eval(), h) for name, (_, model) in variants.items()},
        point.rounds,
        clock,
    )
    how = (
        f"batch {point.batch}, sequence {point.sequence}, {point.layers} of 24 blocks, "
        f"{str(h.dtype).removeprefix('torch.')}, {point.rounds} rounds"
    )
    return [
        Claim("latency", "table 1", name, paper, f"{ratios[name]:.3f}", ratios[name], how)
        for name, (paper, _) in variants.items()
        if name != "merged"
    ]


def training(threads: int = 1, batch: int = 4, sequence: int = 256) -> list[Claim]:
    """Steps (forward, backward, AdamW) per second with LoRA over those of full fine-tuning."""
    rows = []
    for name, config in (("small", models.GPT2_SMALL), ("medium", models.GPT2_MEDIUM)):
        h = torch.randn(batch, sequence, config.n_embd, dtype=dtype_here())
        variants = {
            "full": _blocks(2, config),
            "loralib": models.add_lora(_blocks(2, config), RANK, loralib),
            "lora_fused": models.add_lora(_blocks(2, config), RANK),
        }
        calls = {key: _step(model, h) for key, model in variants.items()}
        ratios = _against_first(calls, ROUNDS, clock_for(threads))
        how = (
            f"blocks of GPT-2 {name}, {batch} x {sequence} tokens, forward + backward + AdamW, "
            f"{str(h.dtype).removeprefix('torch.')}, no embeddings and no language-model head"
        )
        rows += [
            Claim(
                "throughput", "4.2", f"GPT-2 {name}, {key} over full fine-tuning",
                "1.33 (GPT-3, V100)", f"{1 / ratios[key]:.2f}", 1 / ratios[key], how,
            )
            for key in ("loralib", "lora_fused")
        ]  # fmt: skip
    return rows


def switching(threads: int = 1) -> list[Claim]:
    """Merge one task's adapters, take them out again, merge the next: time and exactness."""
    rows = []
    libraries = (("loralib", loralib), ("lora_fused", lora_fused.loralib))
    for name, library in libraries:
        model = models.add_lora(_blocks(2), RANK, library)
        _fill_adapters(model)
        layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A")]
        for layer in layers:
            layer.merge_weights = True
        before = [layer.weight.detach().clone() for layer in layers]
        nanoseconds = _cycles(model, clock_for(threads), 10)
        drift = max(
            float((layer.weight.detach() - old).abs().max())
            for layer, old in zip(layers, before, strict=True)
        )
        rows.append(
            Claim(
                "switching", "4.2", f"{name}: merge and restore, 2 blocks",
                "adapters are swapped by subtracting BA and adding B'A'",
                f"{nanoseconds / 1e6:.1f} ms, weight off by {drift:.2g}", drift,
                f"10 cycles, {str(dtype_here()).removeprefix('torch.')}",
            )
        )  # fmt: skip
    return rows


def _cycles(model: nn.Module, clock: Clock, count: int) -> float:
    def cycle() -> None:
        model.eval()
        model.train()
        _fill_adapters(model)

    return elapsed_ns(cycle, count, clock) / count


def _fill_adapters(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.02)


def _blocks(layers: int, config: GPT2Config = models.GPT2_MEDIUM) -> Any:
    """GPT-2's blocks; a tiny vocabulary, for embeddings take no part."""
    few = GPT2Config(
        n_layer=layers, n_embd=config.n_embd, n_head=config.n_head, vocab_size=8,
        bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = GPT2Model(few)
    return model.to(dtype_here())


def _forward(model: Any, h: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(inputs_embeds=h)

    return call


def _step(model: Any, h: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def call() -> None:
        optimizer.zero_grad()
        model(inputs_embeds=h).last_hidden_state.square().mean().backward()
        optimizer.step()

    return call


def _against_first(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Clock
) -> dict[str, float]:
    """Median ratio of each call's time to the first one's, round by round."""
    paces = {name: pace_of(call, clock) for name, call in calls.items()}
    samples = interleaved(calls, paces, rounds, clock)
    base = samples[next(iter(calls))]
    return {name: paired_ratio(values, base).median for name, values in samples.items()}
