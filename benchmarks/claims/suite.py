"""Runs every claim, shows a table and writes claims.json: `python -m benchmarks --suite claims`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.claims import counts, rank, speed, storage
from benchmarks.claims.claim import Claim, Missing
from benchmarks.machine import commit, describe_machine, versions

SCHEMA = "lora_fused.claims"
SCHEMA_VERSION = 1
PARTS: dict[str, Callable[[], list[Claim]]] = {
    "trainable parameters": counts.claims,
    "storage": storage.claims,
    "task switching": speed.switching,
    "training throughput": speed.training,
    "inference latency": speed.inference,
    "rank deficiency": rank.claims,
}


def run(console: Console, save_to: Path) -> list[Claim]:
    """Every part in turn; one that fails is named, and the others go on."""
    torch.set_num_threads(1)
    found: list[Claim] = []
    failed: dict[str, str] = {}
    for name, part in PARTS.items():
        with console.status(name):
            try:
                found += part()
            except Missing as what:
                failed[name] = str(what)
            except Exception as error:  # one claim less, and said so
                failed[name] = f"{type(error).__name__}: {error}"
    console.print(table_of(found))
    for name, why in failed.items():
        console.print(f"[yellow]No claims of {name}: {why}", highlight=False)
    save(found, failed, save_to)
    console.print(f"{save_to}", highlight=False)
    return found


def save(found: list[Claim], failed: dict[str, str], path: Path) -> None:
    document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(1),
        "versions": versions(),
        "commit": commit(),
        "claims": [asdict(claim) for claim in found],
        "failed": failed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def table_of(found: list[Claim]) -> Table:
    table = Table(title="The LoRA paper's claims (arXiv 2106.09685), on this machine")
    for heading in ("section", "what", "paper", "here", "how", "note"):
        table.add_column(heading, overflow="fold")
    group = ""
    for claim in found:
        if claim.group != group:
            table.add_section()
            group = claim.group
        table.add_row(claim.section, claim.what, claim.paper, claim.here, claim.how, claim.note)
    return table
