"""Trainable parameters (tables 2, 3 and 4): exact, from the modules themselves, on `meta`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.claims import models
from benchmarks.claims.claim import Claim, millions

HOW = "counted on meta, r on Wq and Wv"
ADAPTER_L = 224

PRINTED = "the paper's formula 2·L·d·r gives this number, not the one it prints"
LORA: list[tuple[str, str, Callable[[], nn.Module], int, str, str]] = [
    ("RoBERTa-base, r = 8", "table 2", models.roberta_base, 8, "0.3 M", ""),
    ("RoBERTa-large, r = 8", "table 2", models.roberta_large, 8, "0.8 M", ""),
    ("DeBERTa-XXL, r = 16", "table 2", models.deberta_xxl, 16, "4.7 M", ""),
    ("GPT-2 medium, r = 4", "table 3", models.gpt2_medium, 4, "0.35 M", PRINTED),
    ("GPT-2 large, r = 4", "table 3", models.gpt2_large, 4, "0.77 M", PRINTED),
    ("GPT-3 175B, r = 1", "table 4", models.gpt3_175b, 1, "4.7 M", ""),
    ("GPT-3 175B, r = 8", "table 4", models.gpt3_175b, 8, "37.7 M", ""),
]


def claims() -> list[Claim]:
    rows = []
    for what, section, build, r, paper, note in LORA:
        with torch.device("meta"):
            count = models.trainable(models.add_lora(build(), r))
        rows.append(Claim("parameters", section, what, paper, millions(count), count, HOW, note))
    with torch.device("meta"):
        count = models.trainable(models.add_adapters_l(models.gpt2_medium(), ADAPTER_L))
    what = f"GPT-2 medium, Adapter-L, bottleneck {ADAPTER_L}"
    how = "counted on meta"
    rows.append(Claim("parameters", "table 3", what, "11.09 M", millions(count), count, how))
    return rows
