"""Pieces of PTX text: comments, braces, lists, declarations of variables."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .instruction import Variable, type_bytes


class PtxSyntaxError(ValueError):
    """The text is not PTX that this parser understands."""


_VARIABLE = re.compile(
    r"\.(?P<space>param|shared|local|global|const)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$%]+)\s*"
    r"(?P<array>\[\s*\d*\s*\])?\s*(?:=\s*(?P<data>.*))?$",
    re.S,
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxSyntaxError("unbalanced braces")


def module_variables(text: str) -> Iterator[Variable]:
    text = re.sub(r"\.section\b.*", "", text, flags=re.S)
    for statement in text.split(";"):
        found = re.search(r"\.(?:shared|global|const)\b.*", statement, re.S)
        if found:
            declared = variable(found[0].strip())
            declared.extern = ".extern" in statement
            yield declared


def variable(text: str) -> Variable:
    match = _VARIABLE.match(text)
    if match is None:
        raise PtxSyntaxError(f"cannot read the declaration {text!r}")
    unit = type_bytes(match["type"])
    count = 1
    if match["array"]:
        count = int(match["array"].strip("[] \t\n") or 0)
    data = b""
    if match["data"]:
        values = re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", match["data"])
        data = b"".join((int(v, 0) % (1 << 8 * unit)).to_bytes(unit, "little") for v in values)
    return Variable(match["name"], match["space"], int(match["align"] or unit), unit * count, data)


def split(text: str) -> list[str]:
    """Split at commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
