"""Seeded faults in the compiled Triton kernels: each is found, where it shows.

A fault changes one instruction of the PTX that ships. By default the first fault of each kernel is
tried, `full` tries all.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from lora_fused.backends.triton.candidates import SHIPPED
from lora_fused.config import Tiles
from lora_fused.testing import make_case
from tests.ptx_emulator import TOGETHER, Schedule
from tests.ptx_emulator.testing import with_fault
from tests.triton import emulated as emulation_module
from tests.triton.compiled import Compiled, Request
from tests.triton.emulate_shipped import Size, emulate
from tests.triton.emulated import emulated
from tests.triton.operations import check_operations, route_of

BARRIER = r"bar\.sync\s+0;"
PROXY = r"fence\.proxy\.async\S*;"
COPY_WAIT = r"(cp\.async\.wait_group\s+)\d;"
STORE_WAIT = r"cp\.async\.bulk\.wait_group\S*\s+0;"
MMA_WAIT = r"(wgmma\.wait_group\S*\s+)\d;"
MMA_FENCE = r"wgmma\.fence\S*;"
EXPECT = r"(expect_tx[^;]*,\s*)32768;"
INIT = r"(mbarrier\.init\S*\s+\[[^\]]*\],\s*)1;"
RETRY = r"@!complete bra\.uni waitLoop;"
WAIT = r"waitLoop:.*?bra\.uni waitLoop;"
COMMIT = r"@\S+\s+tcgen05\.commit[^;]*;"
TENSOR_WAIT = r"tcgen05\.wait::\S*;"
LESS = r"setp\.lt\.s32"
XOR = r"xor\.b32"
STORE = "bulk.tensor.2d.global"
LATE = Schedule("reversed", "late")


class Fault(NamedTuple):
    """The `nth` match of `pattern` becomes `new`; `kind` is found where the text has `place`."""

    name: str
    pattern: str
    nth: int
    new: str
    kind: str
    place: str
    schedule: Schedule = TOGETHER


class Kernel(NamedTuple):
    """A shipped choice and the size on which its faults are tried."""

    choice: str
    size: Size
    faults: list[Fault]


KERNELS = [
    # TMA, mbarrier, wgmma, persistent blocks
    Kernel("sm_90 half forward split 128x128x64r0w8s4dp", Size(264, 336, 136, 20), [
        Fault("expect-less", EXPECT, 0, r"\g<1>16384;", "in-flight", "wgmma"),
        Fault("expect-more", EXPECT, 3, r"\g<1>49152;", "deadlock", "try_wait"),
        Fault("full-wait", WAIT, 0, "", "in-flight|uninitialised", "wgmma"),
        Fault("full-retry", RETRY, 0, "", "in-flight", "wgmma", LATE),
        Fault("init-count", INIT, 0, r"\g<1>2;", "deadlock", "try_wait"),
        Fault("stage-wait", MMA_WAIT, 2, r"\g<1>2;", "in-flight", "bulk.tensor.2d.shared"),
        Fault("accumulator-wait", MMA_WAIT, 1, r"\g<1>1;", "in-flight", "add.f32"),
        Fault("mma-fence", MMA_FENCE, 1, "", "missing-fence", "wgmma"),
        Fault("rank-barrier", BARRIER, 1, "", "race", "wgmma"),
        Fault("rank-proxy", PROXY, 0, "", "missing-proxy-fence", "wgmma"),
        Fault("rank-swizzle", XOR, 0, "or.b32", "race", "st.shared"),
        Fault("store-reuse", BARRIER, 2, "", "in-flight", "stmatrix"),
        Fault("store-barrier", BARRIER, 3, "", "race", STORE),
        Fault("store-proxy", PROXY, 1, "", "missing-proxy-fence", STORE),
        Fault("store-swizzle", XOR, 2, "or.b32", "uninitialised", STORE),
        Fault("store-wait", STORE_WAIT, 0, "", "in-flight", "stmatrix"),
        Fault("store-exit", STORE_WAIT, 1, "", "leftover", STORE),
        Fault("rank-bound", LESS, 0, "setp.le.s32", "out-of-bounds", "ld.global"),
    ]),
    # cp.async, wgmma, s from registers
    Kernel("sm_90 half dx one_pass 64x128x64r16w4s3", Size(80, 136, 336, 12), [
        Fault("shrink-barrier", BARRIER, 2, "", "race", "wgmma"),
        Fault("exchange-barrier", BARRIER, 5, "", "race", "ld.shared"),
        Fault("expand-barrier", BARRIER, 7, "", "race", "wgmma"),
        Fault("proxy", PROXY, 0, "", "missing-proxy-fence", "wgmma"),
        Fault("expand-proxy", PROXY, 2, "", "missing-proxy-fence", "wgmma"),
        Fault("mma-fence", MMA_FENCE, 2, "", "missing-fence", "wgmma"),
        Fault("copy-wait", COPY_WAIT, 0, r"\g<1>4;", "in-flight", "wgmma"),
        Fault("y-wait", MMA_WAIT, 2, r"\g<1>1;", "in-flight", "cvt"),
        Fault("bound", LESS, 1, "setp.le.s32", "out-of-bounds", "cp.async"),
    ]),
    Kernel("sm_90 half shrink shrink 64x0x64r64w8s3", Size(80, 336, 32, 40), [
        Fault("stage-wait", MMA_WAIT, 0, r"\g<1>2;", "in-flight", "cp.async"),
        Fault("copy-wait", COPY_WAIT, 0, r"\g<1>3;", "in-flight", "wgmma"),
        Fault("barrier", BARRIER, 1, "", "race", "wgmma"),
        Fault("stage-barrier", BARRIER, 2, "", "in-flight", "cp.async"),
        Fault("proxy", PROXY, 0, "", "missing-proxy-fence", "wgmma"),
        Fault("mma-fence", MMA_FENCE, 0, "", "missing-fence", "wgmma"),
        Fault("s-wait", MMA_WAIT, 1, r"\g<1>1;", "in-flight", "mul.f32"),
        Fault("bound", LESS, 0, "setp.le.s32", "out-of-bounds", "cp.async"),
    ]),
    # TMA, mbarrier, tcgen05 with tensor memory
    Kernel("sm_100 half forward split 128x128x64r0w8s4d", Size(136, 336, 136, 20), [
        Fault("tensor-load-wait", TENSOR_WAIT, 1, "", "in-flight", "mov.b64"),
        Fault("tensor-store-wait", TENSOR_WAIT, 0, "", "in-flight", "tcgen05.mma"),
        Fault("expect-less", EXPECT, 0, r"\g<1>16384;", "in-flight", "tcgen05.mma"),
        Fault("full-wait", WAIT, 0, "", "in-flight|uninitialised", "tcgen05.mma"),
        Fault("mma-wait", WAIT, -1, "", "in-flight|race", "tcgen05|mbarrier"),
        Fault("full-retry", RETRY, 0, "", "in-flight", "tcgen05.mma", LATE),
        Fault("stage-retry", RETRY, 1, "", "in-flight", "cp.async.bulk", LATE),
        Fault("rank-retry", RETRY, 2, "", "in-flight", "tcgen05.mma", LATE),
        Fault("last-stage-retry", RETRY, 3, "", "invalidated", "tcgen05.commit", LATE),
        Fault("y-retry", RETRY, 4, "", "in-flight", "tcgen05.ld", LATE),
        Fault("init-count", INIT, 0, r"\g<1>2;", "deadlock", "try_wait"),
        Fault("commit", COMMIT, 0, "", "deadlock", "try_wait"),
        Fault("rank-commit", COMMIT, 2, "", "deadlock", "try_wait"),
        Fault("alloc-barrier", BARRIER, 0, "", "race", "ld.shared"),
        Fault("rank-proxy", PROXY, 0, "", "missing-proxy-fence", "tcgen05.mma"),
        Fault("store-proxy", PROXY, 1, "", "missing-proxy-fence", STORE),
        Fault("store-exit", STORE_WAIT, 0, "", "leftover", STORE),
        Fault("dealloc", r"@\S+\s+tcgen05\.dealloc[^;]*;", 0, "", "leftover", "ret"),
        Fault("rank-swizzle", XOR, 2, "or.b32", "race", "st.shared"),
    ]),
    Kernel("sm_100 half reduce reduce 64x64x0r64w8s3", Size(336, 80, 72, 40), [
        Fault("copy-wait", COPY_WAIT, 0, r"\g<1>3;", "in-flight", "tcgen05.mma"),
        Fault("stage-barrier", BARRIER, 1, "", "race", "cp.async"),
        Fault("proxy", PROXY, 1, "", "missing-proxy-fence", "tcgen05.mma"),
        Fault("commit", COMMIT, 1, "", "deadlock", "try_wait"),
        Fault("stage-retry", RETRY, 0, "", "in-flight", "cp.async", LATE),
        Fault("sum-retry", RETRY, 1, "", "in-flight", "tcgen05.ld", LATE),
        Fault("tensor-load-wait", TENSOR_WAIT, 1, "", "in-flight", "cvt"),
        Fault("bound", LESS, 1, "setp.le.s32", "out-of-bounds", "ld.global"),
    ]),
]  # fmt: skip


def parameters(faults: slice) -> list[object]:
    return [
        pytest.param(kernel, fault, id=f"{kernel.choice}: {fault.name}")
        for kernel in KERNELS
        for fault in kernel.faults[faults]
    ]


def check(kernel: Kernel, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator lists findings as "kind at line ...", the instruction on a line of its own."""
    choice = next(choice for choice in SHIPPED if str(choice) == kernel.choice)
    name = {"forward": "matmul", "dx": "matmul"}.get(choice.operation, choice.operation)
    original = emulation_module.compile_kernel

    def damaged(request: Request) -> Compiled:
        made = original(request)
        if request.kernel != name:
            return made
        return replace(made, ptx=with_fault(made.ptx, fault.pattern, fault.nth, fault.new))

    monkeypatch.setattr(emulation_module, "compile_kernel", damaged)
    with pytest.raises(AssertionError) as raised:
        emulate(choice, kernel.size, schedule=fault.schedule)
    found = re.findall(r"^(\S+) at line .*\n    (.*)$", str(raised.value), re.M)
    wanted = re.compile(f"({fault.kind}) .*({fault.place})")
    assert any(wanted.match(f"{kind} {text}") for kind, text in found), str(raised.value)[:2000]


@pytest.mark.parametrize(("kernel", "fault"), parameters(slice(1)))
def test_first(kernel: Kernel, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    check(kernel, fault, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "fault"), parameters(slice(1, None)))
def test_others(kernel: Kernel, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    check(kernel, fault, monkeypatch)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("matmul", "cp.async.wait_group 2;", "cp.async.wait_group 3;"),
        ("matmul", "bar.sync 0;", ""),
        ("shrink", "bar.sync 0;", ""),
        ("reduce", "cp.async.wait_group 1;", "cp.async.wait_group 2;"),
    ],
)
def test_sm_80(kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortened wait or a missing barrier in the compiled code does not get through."""
    original = emulation_module.compile_kernel

    def damaged(request):  # type: ignore[no-untyped-def]
        made = original(request)
        if request.kernel != kernel:
            return made
        assert old in made.ptx
        return replace(made, ptx=made.ptx.replace(old, new))

    monkeypatch.setattr(emulation_module, "compile_kernel", damaged)
    case = make_case(80, 272, 96, 16, torch.bfloat16)
    tiles = Tiles(64, 64, 32, num_warps=4, num_stages=4)
    with emulated("sm_80", Schedule("together", "late")), pytest.raises(AssertionError):
        check_operations(case, route_of(case, forward=tiles, dx=tiles))
