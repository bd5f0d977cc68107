"""All seeded faults of the test suite, read from the sources: the list in docs/gpu-without-gpu.md.

`python -m tests.ptx_emulator.fault_list` prints it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
LISTS = {
    "KERNELS": "named by a finding",
    "TEXT": "named by a finding",
    "FINDINGS": "named by a finding",
    "FAULTS": "named by a finding or in the numbers",
    "MUTANTS": "changed source, found or in the numbers",
    "NUMBERS": "in the numbers",
    "EQUIVALENT": "equivalent",
}


def lists() -> Iterator[tuple[str, str, list[str]]]:
    """(file, list, names) of every list that holds `Fault`s or `Mutant`s, itself or by kernel."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.List)):
                continue
            target = ast.unparse(node.targets[0])
            names = [
                str(ast.literal_eval(call.args[0]))
                for call in ast.walk(node.value)
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("Fault", "Mutant")
            ]
            if target in LISTS and names:
                yield str(path.relative_to(TESTS.parent)), target, names


def table() -> str:
    """The list as Markdown."""
    lines = ["| test file | how it shows | faults |", "|---|---|---|"]
    for file, target, names in lists():
        lines.append(f"| `{file}` | {LISTS[target]} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
