"""One shipped choice in the emulator: shapes that exercise it, the truth, the planned traffic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fused.backends import triton
from lora_fused.backends.triton.candidates import Shipped, takes_bias
from lora_fused.config import Mask
from lora_fused.reference import dropout_threshold, effective_scaling
from lora_fused.testing import Case, assert_close_to_ref, make_case
from tests.ptx_emulator import TOGETHER, Schedule
from tests.triton.emulated import Emulation, Launch, emulated
from tests.triton.operations import route_of
from tests.triton.shipped import allowing_tf32

DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


@dataclass(frozen=True)
class Size:
    """M, K, N of the layer and its rank."""

    M: int
    K: int
    N: int
    R: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}r{self.R}"


def sizes(choice: Shipped) -> list[Size]:
    """Ragged sizes: whole tiles and parts of one in every dimension, aligned to 16 and not at all.

    Contraction and outputs change places between forward and dx; the number of steps along the
    contraction takes different remainders by the number of stages.
    """
    t = choice.tiles
    m, n, k = t.block_m, t.block_n or 64, t.block_k or 64
    r = t.block_r or 16
    if choice.operation == "reduce":
        found = [(2 * m + 16, n + 16, 2 * n - 16, r), (m + 7, n + 5, n - 3, r - 3)]
    elif choice.operation == "shrink":
        found = [(m + 16, 4 * k + 16, 32, r), (m - 3, k + 5, 24, r - 3), (m, 3 * k, 16, r)]
    else:
        rows = min(m, 16) if choice.strategy == "decode" else m + 16
        found = [(rows, 4 * k + 16, n + 16, r), (rows - 5, 2 * k + 8, 2 * n, r // 2)]
        if not t.descriptors:
            found.append((rows - 3, k + 5, n + 3, r - 3))
        if choice.strategy == "split":
            found.append((rows, k, 32, 100))
    if choice.operation == "dx":
        found = [(M, N, K, R) for M, K, N, R in found]
    return [Size(*size) for size in found]


def emulate(
    choice: Shipped,
    size: Size,
    dropout_p: float = 0.0,
    schedule: Schedule = TOGETHER,
    counters: bool = False,
) -> tuple[dict[str, Tensor], Emulation, Case]:
    """Run a choice on a size; its outputs are held against the reference."""
    with allowing_tf32(choice.kind == "tf32"):
        given = (size.M, size.K, size.N, size.R, DTYPES[choice.kind])
        case = make_case(*given, bias=takes_bias(choice), dropout_p=dropout_p)
        with emulated(choice.target, schedule, counters) as emulation:
            outputs = _outputs(choice, case)
    if choice.kind != "tf32":
        truth, baseline = case.truth(), case.baseline()
    else:
        truth, baseline = case.truth(), _as_tf32(case).baseline()
    for name, got in outputs.items():
        assert_close_to_ref(name, got, truth[name], baseline[name])
    return outputs, emulation, case


def _as_tf32(case: Case) -> Case:
    """A baseline whose inputs have TF32's ten bits."""

    def rounded(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    return replace(
        case, x=rounded(case.x), weight=rounded(case.weight), lora_A=rounded(case.lora_A),
        lora_B=rounded(case.lora_B), dy=rounded(case.dy),
    )  # fmt: skip


def _outputs(choice: Shipped, case: Case) -> dict[str, Tensor]:
    scale, mask = case.scaling, None
    if case.dropout_p > 0:
        scale = effective_scaling(case.scaling, case.dropout_p)
        mask = Mask(case.seed, dropout_threshold(case.dropout_p))
    route = route_of(case, choice.strategy, **{choice.operation: choice.tiles})
    x, w, a, b, dy, bias = case.x, case.weight, case.lora_A, case.lora_B, case.dy, case.bias
    ds = (scale * (dy.float() @ b.float())).to(x.dtype)
    s = case.baseline()["s"]
    if choice.operation == "shrink":
        return {"s": triton.shrink(route, x, a, scale, mask)}
    if choice.operation == "reduce":
        da, db = triton.reduce_pair(route, ds, x, mask, a.dtype, dy, s, b.dtype)
        assert da is not None and db is not None
        return {"da": da, "db": db}
    if choice.operation == "forward":
        if choice.strategy == "split":
            return {"y": triton.matmul(route, "forward", x, w, s, b, bias)}
        y, s = triton.shrink_matmul(route, "forward", x, w, a, b, scale, bias)
        return {"y": y, "s": s}
    if choice.strategy == "split":
        return {"dx": triton.matmul(route, "dx", dy, w, ds, a, mask=mask)}
    return {"dx": triton.shrink_matmul(route, "dx", dy, w, b, a, scale)[0]}


def check_traffic(choice: Shipped, case: Case, outputs: dict[str, Tensor], launch: Launch) -> None:
    """Every operand moves the bytes of the plan, and at most 2 % more.

    The plan of a matmul: each tile of y reads its rows of x and its columns of w once, and is
    written once. Shrink reads x once per block of ranks, reduce likewise x and dy.
    """
    t = choice.tiles
    plan: list[tuple[str, Tensor, int]] = []
    if choice.operation in ("forward", "dx"):
        x, y = (case.x, outputs["y"]) if choice.operation == "forward" else (case.dy, outputs["dx"])
        rows, columns = _cdiv(y.shape[0], t.block_m), _cdiv(y.shape[1], t.block_n)
        plan = [("load", x, columns), ("load", case.weight, rows), ("store", y, 1)]
    elif choice.operation == "shrink":
        ranks = _cdiv(case.lora_A.shape[0], t.block_r)
        plan = [("load", case.x, ranks), ("store", outputs["s"], 1)]
    else:
        ranks = _cdiv(case.lora_A.shape[0], t.block_r)
        plan = [("load", case.x, ranks), ("load", case.dy, ranks), ("store", outputs["da"], 1)]
    for kind, tensor, times in plan:
        moved, planned = launch.bytes(kind, tensor), tensor.nbytes * times
        assert planned <= moved <= 1.02 * planned, (
            f"{choice}: {kind} of {list(tensor.shape)} moved {moved} bytes, planned {planned}"
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
