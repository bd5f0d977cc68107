"""One GPU kernel against plain torch on small problems: the comparison behind the self-check."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fused import backends
from lora_fused.autograd import Saved, lora_backward, lora_forward
from lora_fused.config import Call, Config, Mask, Member, Problem, Route, Tiles, group_columns
from lora_fused.devices import Device
from lora_fused.gpu_choice import part_config
from lora_fused.reference import dropout_threshold, effective_scaling
from lora_fused.testing import Case, assert_close_to_ref, make_case

_DROPOUT = 0.3
_OUTPUTS = {
    "forward": ("y", "s"),
    "dx": ("dx",),
    "reduce": ("da", "db"),
    "backward": ("dx", "da", "db"),
    "shrink": ("s", "da"),
}

_NEEDS = {
    "forward": frozenset[str](),
    "dx": frozenset({"x"}),
    "reduce": frozenset({"lora_A", "lora_B"}),
    "backward": frozenset({"x", "lora_A", "lora_B"}),
    "shrink": frozenset({"lora_A"}),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is checked, and demoted, as one: part is "forward", "dx", "reduce", "backward" or
    "shrink"."""

    device: Device
    backend: str
    part: str
    strategy: str
    tiles: Tiles
    dtype: torch.dtype
    grouped: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        group = "group " if self.grouped else ""
        return f"{self.backend} {group}{self.part} {self.strategy} {dtype} {self.tiles}"


def run_check(kernel: Kernel, where: torch.device) -> str:
    """Compare with the reference on each kind of problem the kernel takes; "" or what was wrong."""
    module = backends.load(kernel.backend)
    if module is None:
        return backends.why_missing(kernel.backend)
    compare, ran = (_compare_group if kernel.grouped else _compare), False
    try:
        for cases, problem in _small_problems(kernel, where):
            legal = module.candidates(problem, kernel.device, kernel.part)
            if kernel.strategy in {candidate.strategy for candidate in legal}:
                compare(kernel, cases, problem, where)
                ran = True
    except AssertionError as error:
        return f"wrong result, {error}"
    except Exception as error:  # a compiler's or a launch's: the kernel is demoted and says why
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first}"
    return "" if ran else "there is no small problem to check it on"


def _small_problems(kernel: Kernel, where: torch.device) -> Iterator[tuple[list[Case], Problem]]:
    """Ragged, larger than one tile each way; with and without dropout, bias and transposition."""
    tiles = kernel.tiles
    M = 11 if kernel.strategy == "decode" else 2 * (tiles.block_m or 64) + 5
    wide, deep = (tiles.block_n or 128) + 24, 3 * (tiles.block_k or 64) + 40
    K, N = (wide, deep) if kernel.part in ("dx", "backward") else (deep, wide)
    R = min(tiles.block_r or 16, 64)
    for (dropout_p, bias), by_column in itertools.product(
        ((0.0, True), (_DROPOUT, False)), (False, True)
    ):
        sizes = ((N, R), (40, 8)) if kernel.grouped else ((N, R),)
        cases = [
            make_case(
                M, K, n, r, kernel.dtype, bias=bias, dropout_p=dropout_p,
                fan_in_fan_out=by_column, seed=seed,
            )
            for seed, (n, r) in enumerate(sizes)
        ]  # fmt: skip
        cases = [replace(case, x=cases[0].x) for case in cases]
        yield cases, _problem_of(cases, kernel, where, by_column)


def _problem_of(
    cases: Sequence[Case], kernel: Kernel, where: torch.device, by_column: bool
) -> Problem:
    M, K = cases[0].x.shape
    sizes = tuple((case.lora_B.shape[0], case.lora_B.shape[1]) for case in cases)
    return Problem(
        M, K, sum(n for n, _ in sizes),
        group_columns([r for _, r in sizes])[1] if kernel.grouped else sizes[0][1],
        kernel.dtype, where.type, kernel.dtype,
        has_bias=cases[0].bias is not None,
        dropout=cases[0].dropout_p > 0,
        needs=_NEEDS[kernel.part],
        weight_layout="column" if by_column else "row",
        device=kernel.device,
        group=sizes if kernel.grouped else (),
    )  # fmt: skip


def _compare(kernel: Kernel, cases: Sequence[Case], problem: Problem, where: torch.device) -> None:
    """Raise AssertionError unless the kernel's outputs are right; what surrounds it is torch's."""
    (case,) = cases
    config = part_config(kernel.part, kernel.backend, kernel.strategy, kernel.tiles)
    member = _member(case, problem.needs, where)
    with torch.no_grad():
        call = Call(_route(problem, config), member.scale, member.mask)
        x, dy = case.x.to(where), case.dy.to(where)
        y, s = lora_forward(call, x, *member[:4])
        gradients = lora_backward(call, dy, Saved(x, s, *member[:3]))
    found = {"y": y, "s": s, **gradients._asdict()}
    truth, baseline = case.truth(), case.baseline()
    for name in _OUTPUTS[kernel.part]:
        got = found[name]
        assert got is not None, f"{name} is missing"
        assert_close_to_ref(name, got.cpu(), truth[name], baseline[name])


def _compare_group(
    kernel: Kernel, cases: Sequence[Case], problem: Problem, where: torch.device
) -> None:
    """The same for the hooks of a group (see group_hook); the parts beside it by default tiles."""
    config = part_config(kernel.part, kernel.backend, kernel.strategy, kernel.tiles)
    if config.forward == "library":
        config = replace(config, forward="split")
    if config.dx == "library":
        config = replace(config, dx="split")
    route = _route(problem, config)
    ops = backends.BACKENDS[kernel.backend]
    members = [_member(case, problem.needs, where) for case in cases]
    truths, baselines = [c.truth() for c in cases], [c.baseline() for c in cases]
    x, dys = cases[0].x.to(where), [case.dy.to(where) for case in cases]
    with torch.no_grad():
        if kernel.part in ("forward", "shrink"):
            ys, _ = ops.group_forward(route, x, members)
            for y, truth, baseline in zip(ys, truths, baselines, strict=True):
                assert_close_to_ref("y", y.cpu(), truth["y"], baseline["y"])
            return
        s = _stacked([t["s"] for t in baselines]).to(where)
        dx, das, dbs = ops.group_backward(route, dys, x, s, members)
    if kernel.part == "dx":
        expected = [sum(t["dx"] for t in found) for found in (truths, baselines)]
        assert dx is not None and not isinstance(expected[0], int), "dx is missing"
        assert_close_to_ref("dx", dx.cpu(), *expected)  # type: ignore[arg-type]
        return
    for da, db, truth, baseline in zip(das, dbs, truths, baselines, strict=True):
        assert_close_to_ref("da", da.cpu(), truth["da"], baseline["da"])
        assert_close_to_ref("db", db.cpu(), truth["db"], baseline["db"])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """The s of a group, as group_forward lays it out."""
    offsets, width = group_columns([part.shape[1] for part in parts])
    s = parts[0].new_zeros(parts[0].shape[0], width)
    for part, offset in zip(parts, offsets, strict=True):
        s[:, offset : offset + part.shape[1]] = part
    return s


def _member(case: Case, needs: frozenset[str], where: torch.device) -> Member:
    mask, scale = None, case.scaling
    if case.dropout_p > 0:
        seed = torch.full((), case.seed, dtype=torch.int64, device=where)
        mask = Mask(case.seed if where.type == "cpu" else seed, dropout_threshold(case.dropout_p))
        scale = effective_scaling(scale, case.dropout_p)
    weight, lora_A, lora_B, bias = (
        None if t is None else t.to(where)
        for t in (case.weight, case.lora_A, case.lora_B, case.bias)
    )
    assert weight is not None and lora_A is not None and lora_B is not None
    dtype = case.x.dtype
    return Member(weight, lora_A, lora_B, bias, scale, mask, needs, dtype, dtype)


def _route(problem: Problem, config: Config) -> Route:
    dtypes = (problem.dtype,) * 4
    shapes = (problem.M, problem.K), (problem.M, problem.N)
    return Route(problem, config, problem.dtype, False, problem.needs, *shapes, dtypes)
