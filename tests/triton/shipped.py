"""What is shipped, compiled: `python -m tests.triton.shipped` writes the table of resources.

    python -m tests.triton.shipped [TARGET ...]

compiles every choice of candidates.SHIPPED for its target, with and without dropout, and writes
lora_fused/backends/triton/resources.py. Without a GPU; about a quarter of an hour on two cores.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from lora_fused.backends import triton
from lora_fused.backends.triton import launch
from lora_fused.backends.triton.candidates import AMD, SHIPPED, TARGETS, Shipped
from lora_fused.backends.triton.resources import RESOURCES
from lora_fused.config import Mask
from lora_fused.testing import make_case
from tests.triton.compiled import Compiled
from tests.triton.emulated import emulated
from tests.triton.operations import route_of

DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
SHARED_LIMIT = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip
REGISTER_LIMIT = {name: 512 if name in AMD else 255 for name in TARGETS}
HEADER = '''"""What the compiled kernels need: (shared bytes of a block, registers of a thread).

Written by `python -m tests.triton.shipped` from the output of Triton {version}; do not edit. The
larger of the values with and without dropout. tests/triton/test_shipped.py compiles again.
"""

RESOURCES: dict[str, tuple[int, int]] = {{
'''


def compiled(choice: Shipped, sizes: tuple[int, int, int] = (64, 256, 256)) -> Iterator[Compiled]:
    """The kernel of a choice with the usual alignments: without dropout, then with, if it may."""
    yield _compile(choice, sizes, 0.0)
    masks = choice.operation in ("dx", "shrink", "reduce") and choice.strategy != "one_pass"
    wide = choice.operation == "dx" and choice.tiles.block_m * choice.tiles.block_n > 128 * 128
    if masks and choice.strategy != "decode" and not wide:
        yield _compile(choice, sizes, 0.25)


def _compile(choice: Shipped, sizes: tuple[int, int, int], dropout_p: float) -> Compiled:
    """Launch the operation on the host without running it."""
    M, K, N = sizes
    R = choice.tiles.block_r or 64
    case = make_case(M, K, N, R, DTYPES[choice.kind], bias=True, dropout_p=dropout_p)
    route = route_of(case, choice.strategy, **{choice.operation: choice.tiles})
    mask = Mask(case.seed, 1 << 14) if dropout_p else None
    x, w, a, b, dy, s = case.x, case.weight, case.lora_A, case.lora_B, case.dy, torch.zeros(M, R)
    s = s.to(x.dtype)
    with allowing_tf32(choice.kind == "tf32"), emulated(choice.target, execute=False) as emulation:
        if choice.operation == "shrink":
            triton.shrink(route, x, a, 1.0, mask)
        elif choice.operation == "reduce":
            triton.reduce_pair(route, s, x, mask, a.dtype, dy, s, b.dtype)
        elif choice.strategy != "split":
            forward = choice.operation == "forward"
            given = (x, w, a, b, 1.0, case.bias) if forward else (dy, w, b, a, 1.0)
            triton.shrink_matmul(route, choice.operation, *given)
        elif choice.operation == "forward":
            triton.matmul(route, "forward", x, w, s, b, case.bias)
        else:
            triton.matmul(route, "dx", dy, w, s, a, mask=mask)
    return emulation.launches[0].compiled


@contextlib.contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """torch.backends.cuda.matmul.allow_tf32 for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def resources(choice: Shipped) -> tuple[int, int]:
    """The larger needs of a choice's variants, in bytes and registers."""
    variants = list(compiled(choice))
    return max(c.shared for c in variants), max(c.registers for c in variants)


def problems_with(choice: Shipped) -> list[str]:
    """Why a choice must not be shipped."""
    reasons = []
    for made in compiled(choice):
        if made.spills or made.stack:
            reasons.append(f"{made.spills} spills, {made.stack} bytes of stack")
        if made.shared > SHARED_LIMIT[choice.target]:
            reasons.append(f"{made.shared} bytes of shared memory")
        if made.registers > REGISTER_LIMIT[choice.target]:
            reasons.append(f"{made.registers} registers")
    return reasons


def main(targets: list[str]) -> None:
    import triton as installed

    table = dict(RESOURCES)  # of the targets that are left out
    for choice in SHIPPED:
        if targets and choice.target not in targets:
            continue
        table[str(choice)] = resources(choice)
        print(choice, *table[str(choice)], *problems_with(choice), flush=True)
    lines = [f'    "{c}": {table[str(c)]},\n' for c in SHIPPED if str(c) in table]
    file = Path(launch.__file__).with_name("resources.py")
    file.write_text(HEADER.format(version=installed.__version__) + "".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
