"""Puts a result file's numbers into the README: `python -m benchmarks.publish RESULT.json`.

Writes the table and the losing cells between the markers of README.md, and docs/tax.svg. A
number of the README is never typed by hand; tests/test_publish.py holds the two together.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures.tax import tax_by_tokens
from benchmarks.providers import OURS, PEFT, PREPACKED, SMART
from benchmarks.record import Record, Results, load_or_exit
from benchmarks.shapes import PASSES
from benchmarks.summary import ClassMean, against_best, class_means, excess_over_frozen

ROOT = Path(__file__).parent.parent
README, FIGURE = ROOT / "README.md", ROOT / "docs" / "tax.svg"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
COLUMNS = (SMART, PEFT, OURS, PREPACKED)
MOST_LOSSES = 6


def section(results: Results, name: str) -> str:
    """The README's text about one result file, called `name` in benchmarks/results."""
    m = results.machine
    where = f"{m['cpu']}{', VM' if m['virtual'] else ''}, torch {results.versions['torch']}"
    lines = [
        "Time relative to the frozen `nn.Linear`, forward / forward + backward, "
        f"{m['threads']} thread{'s' * (m['threads'] > 1)}, r ≤ 16, geometric mean over layers of "
        f"real models. {where}; commit {results.commit}, "
        f"[the run](benchmarks/results/{name}). Make yours with `make bench`.",
        "",
        "| class (cases) | smart torch (`addmm`) | PEFT | lora_fused | prepacked |",
        "|---|---|---|---|---|",
        *_rows(results.records),
        "",
        *_losses(results.records),
        *_memory(results),
    ]
    return "\n".join(lines)


def _rows(records: Sequence[Record]) -> Iterator[str]:
    for dropout in sorted({r.dropout for r in records}):
        for (dtype, tokens), row in class_means(records, dropout).items():
            cells = {name: _cell(row, name) for name in COLUMNS}
            best = min((c for c in cells.values() if c), key=lambda c: c[1], default=None)
            words = [
                "-" if c is None else f"**{c[0]}**" if best and c[1] == best[1] else c[0]
                for c in cells.values()
            ]
            label = "1 token" if tokens == "1" else f"{tokens} tokens"
            extra = f", dropout {dropout:g}" if dropout else ""
            cases = max(mean.cases for mean in row.values())
            yield f"| {dtype}, {label}{extra} ({cases}) | {' | '.join(words)} |"


def _cell(row: dict[tuple[str, str], ClassMean], name: str) -> tuple[str, float] | None:
    """ "F / F+B" and the latter as a number."""
    if any((name, pass_) not in row for pass_ in PASSES):
        return None
    forward, both = (row[name, pass_].tax for pass_ in PASSES)
    return f"{forward:.2f} / {both:.2f}", round(both, 2)


def _losses(records: Sequence[Record]) -> Iterator[str]:
    """The cells in which we lose, and how many there are."""
    words = []
    for name, label in ((OURS, ""), (PREPACKED, "prepacked, ")):
        cells = against_best(records, name)
        worse = [rivalry for rivalry in cells if rivalry.is_worse]
        words.append(f"{label}{len(worse)} of {len(cells)} cells")
        listed = [
            f"{r.record.layer_key} {r.record.dtype} M={r.record.M} r={r.record.R}"
            f"{f' p={r.record.dropout:g}' if r.record.dropout else ''} {r.record.pass_} "
            f"{r.ratio.median:.2f}"
            for r in worse[:MOST_LOSSES]
        ]
        if listed:
            more = ", …" if len(worse) > MOST_LOSSES else ""
            words[-1] += f" ({'; '.join(listed)}{more})"
    yield (
        "More than 5 % slower than the best of naive torch, smart torch and PEFT: "
        f"{'; '.join(words)}."
    )


def _memory(results: Results) -> Iterator[str]:
    excess = excess_over_frozen(
        {m.provider: m.resident_bytes or m.peak_bytes for m in results.memory}
    )
    if OURS in excess and excess.get(PEFT, 0) > 0:
        yield (
            "Peak memory of forward + backward above the frozen layer, M = K = N = 2048, bf16 with "
            f"fp32 adapters and dropout: {excess[OURS] / excess[PEFT]:.0%} of PEFT's."
        )


def publish(path: Path) -> None:
    results = load_or_exit(path, "python -m benchmarks.publish")
    text = README.read_text()
    if not re.search(f"{BEGIN}.*{END}", text, re.S):
        raise ValueError(f"README.md has no section between {BEGIN} and {END}")
    made = f"{BEGIN}\n{section(results, path.name)}\n{END}"
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: made, text, flags=re.S))
    picture = tax_by_tokens(results.records, "bf16", PASSES[1])
    if picture is not None:
        FIGURE.write_bytes(base64.b64decode(picture.split(",", 1)[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="a file of benchmarks/results")
    publish(parser.parse_args().result)


if __name__ == "__main__":
    main()
