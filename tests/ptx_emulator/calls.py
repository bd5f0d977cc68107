"""Calls of device functions (PTX ISA `.func` and `call`): each call becomes a copy of the body.

Arguments and results travel by value through `.param` variables of the caller; here these are
local variables of the thread, and the formal parameters are other names for them.  What has no
body here (function pointers, other modules, `vprintf`) and recursion stay a `call`, which raises
with its line.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from .instruction import Instruction, Reg
from .text import matching_brace

if TYPE_CHECKING:
    from .syntax import KernelParser

RETURN = "$return"
_FUNCTION = re.compile(
    r"\.func\s*(?:\((?P<result>[^)]*)\))?\s*(?P<name>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?[^;{]*"
)
_CALL = re.compile(
    r"(?:\(\s*(?P<result>[\w$]+)\s*\)\s*,\s*)?(?P<name>[\w$]+)\s*"
    r"(?:,\s*\((?P<args>[^)]*)\))?(?P<rest>.*)$",
    re.S,
)


class Function(NamedTuple):
    """Names of the formal result and parameters, and where the body is."""

    formals: list[str]
    begin: int
    end: int


def functions(text: str) -> dict[str, Function]:
    """All functions that have a body, by name."""
    found = {}
    for match in _FUNCTION.finditer(text):
        if text[match.end() : match.end() + 1] == "{":
            declared = f"{match['result'] or ''},{match['params'] or ''}"
            formals = re.findall(r"([\w$]+)\s*(?:\[\s*\d*\s*\]\s*)?(?:,|$)", declared)
            end = matching_brace(text, match.end())
            found[match["name"]] = Function(formals, match.end() + 1, end)
    return found


def inline(parser: KernelParser, call: str, ins: Instruction) -> bool:
    """Put the body in the place of a call; False if it cannot be."""
    match = _CALL.match(call)
    if match is None or match["rest"].strip():
        return False
    function = parser.module.functions.get(match["name"])
    actual = re.findall(r"[\w$%]+", f"{match['result'] or ''} {match['args'] or ''}")
    names = [parser.name_of(name) for name in actual]
    if function is None or match["name"] in parser.calls or len(names) != len(function.formals):
        return False
    if any(isinstance(name, Reg) for name in names):
        return False
    symbols = {formal: name.name for formal, name in zip(function.formals, names, strict=True)}
    with parser.inside(match["name"], symbols):
        if ins.guard is not None:
            parser.leave(ins, Reg(ins.guard.name, not ins.guard.negated))
        parser.read(function.begin, function.end)
    return True
