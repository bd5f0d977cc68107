"""Real text that every machine has: docstrings and source code of the Python standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

MODULES = (
    *("asyncio", "email", "http", "importlib", "inspect", "ipaddress", "logging", "mailbox"),
    *("multiprocessing", "_pydecimal", "tarfile", "tkinter", "turtle", "unittest", "xml"),
)
_SHORTEST = 40
_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def sources(module: str) -> Iterator[str]:
    """The source files of a top-level module; none if the module is not installed."""
    package, file = _LIBRARY / module, _LIBRARY / f"{module}.py"
    paths = sorted(package.rglob("*.py")) if package.is_dir() else [file]
    for path in paths:
        parts = path.relative_to(_LIBRARY).parts
        if path.is_file() and not {"test", "tests", "idle_test"} & set(parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def docstrings(module: str) -> list[str]:
    """The docstrings of a module's functions and classes, each once, without very short ones."""
    found: dict[str, None] = {}
    for source in sources(module):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    found[text] = None
    return list(found)


Labelled = list[tuple[str, int]]


def labelled_docstrings(
    modules: Sequence[str], per_module: int, seed: int = 0
) -> tuple[Labelled, Labelled, list[str]]:
    """(training, test, label names): which module does a docstring come from?

    At most per_module docstrings of each module, a quarter of them for the test; none occurs twice.
    """
    generator = random.Random(seed)
    train: Labelled = []
    test: Labelled = []
    names: list[str] = []
    seen: set[str] = set()
    for module in modules:
        texts = [text for text in docstrings(module) if text not in seen]
        if not texts:
            continue
        seen.update(texts)
        generator.shuffle(texts)
        pairs = [(text, len(names)) for text in texts[:per_module]]
        held_out = len(pairs) // 4
        test += pairs[:held_out]
        train += pairs[held_out:]
        names.append(module)
    generator.shuffle(train)
    return train, test, names
