"""Tensor copies and warpgroup multiplication through the executor, from memory to memory."""

from __future__ import annotations

import numpy as np
import pytest

from . import EVERY_SCHEDULE, Schedule, TensorMap, Uninitialised, run
from .harness import kernel
from .layouts import Swizzle, from_float, to_float
from .smem_operand import SmemDescriptor, operand_addresses
from .wgmma import accumulator_table, encode_descriptor

SMEM = ".extern .shared .align 1024 .b8 smem[];"
BARRIER = """mov.u32 %r50, smem; add.s32 %r51, %r50, 8192; setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r51], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r51], BYTES;"""
WAIT = """WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r51], 0; @!%p2 bra WAIT;"""
DUMP = """shl.b32 %r60, %t, 4; add.s32 %r61, %r60, %r50; cvt.u64.u32 %d20, %r60;
    add.s64 %d21, %a0, %d20; setp.lt.u32 %p3, %r60, BYTES;
    @%p3 ld.shared.v4.b32 {%r62, %r63, %r64, %r65}, [%r61];
    @%p3 st.global.v4.b32 [%d21], {%r62, %r63, %r64, %r65};"""


def with_map(body: str) -> str:
    body = "mov.b64 %d1, map; cvta.param.u64 %d1, %d1;" + body
    return kernel(body, 1, declarations=SMEM).replace("k(", "k(.param .align 64 .b8 map[128], ", 1)


def load_box(tensor: np.ndarray, box, start, swizzle: int = 0, schedule=EVERY_SCHEDULE[0]):
    """The shared memory after loading `box` at `start` (both outermost first)."""
    rank, size = tensor.ndim, int(np.prod(box)) * tensor.itemsize
    out = np.zeros(size, np.uint8)
    at = ", ".join(str(c) for c in start[::-1])
    copy = f"""@%p1 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r50], [%d1, {{{at}}}], [%r51];"""
    text = with_map((BARRIER + copy + WAIT + DUMP).replace("BYTES", str(size)))
    array = TensorMap(tensor, "u16", tensor.shape, box, swizzle)
    threads = max(32, size // 16)
    args = [array, Uninitialised(out)]
    run(text, "k", 1, threads, args, shared=8200, schedule=schedule).check()
    return out.view(tensor.dtype).reshape(box)


def inside(tensor: np.ndarray, box, start) -> np.ndarray:
    """What the box holds: zero where it leaves the tensor."""
    out = np.zeros(box, tensor.dtype)
    for index in np.ndindex(*box):
        at = tuple(s + i for s, i in zip(start, index, strict=True))
        if all(0 <= a < n for a, n in zip(at, tensor.shape, strict=True)):
            out[index] = tensor[at]
    return out


@pytest.mark.parametrize("start", [0, -1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_load_of_every_rank_with_fill(rank: int, start: int) -> None:
    shape, box = (3, 2, 3, 4, 16)[-rank:], (2, 2, 2, 3, 8)[-rank:]
    tensor = np.arange(1, 1 + np.prod(shape), dtype=np.uint16).reshape(shape)
    at = (start,) * rank
    np.testing.assert_array_equal(load_box(tensor, box, at), inside(tensor, box, at))


@pytest.mark.parametrize(("span", "shift", "mask"), [(32, 2, 1), (64, 1, 3), (128, 0, 7)])
def test_swizzles(span: int, shift: int, mask: int) -> None:
    """16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask) of its row."""
    tensor = np.arange(16 * span // 2, dtype=np.uint16).reshape(16, span // 2)
    chunks = load_box(tensor, tensor.shape, (0, 0), span).reshape(16, span // 16, 8)
    for row in range(16):
        for chunk in range(span // 16):
            expected = tensor[row, 8 * chunk : 8 * chunk + 8]
            np.testing.assert_array_equal(chunks[row, chunk ^ (row >> shift & mask)], expected)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
def test_load_under_every_schedule(schedule: Schedule) -> None:
    tensor = np.arange(64, dtype=np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(load_box(tensor, (8, 8), (0, 0), 0, schedule), tensor)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_store_leaves_the_outside_alone(rank: int) -> None:
    shape, box = (3, 2, 3, 4, 16)[-rank:], (2, 2, 2, 3, 8)[-rank:]
    start = (*(n - 1 for n in shape[:-1]), 8)
    tensor = np.full(shape, 9, np.uint16)
    size = int(np.prod(box)) * 2
    data = np.arange(1, 1 + np.prod(box), dtype=np.uint16)
    fill = """mov.u32 %r50, smem; shl.b32 %r60, %t, 4; cvt.u64.u32 %d20, %r60;
        add.s64 %d21, %a0, %d20; ld.global.v4.b32 {%r62, %r63, %r64, %r65}, [%d21];
        add.s32 %r61, %r60, %r50;
        st.shared.v4.b32 [%r61], {%r62, %r63, %r64, %r65}; fence.proxy.async.shared::cta;
        bar.sync 0; setp.eq.u32 %p1, %t, 0;"""
    at = ", ".join(str(c) for c in start[::-1])
    store = f"""@%p1 cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%d1, {{{at}}}],
        [%r50];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    array = TensorMap(tensor, "u16", shape, box, 0)
    run(with_map(fill + store), "k", 1, size // 16, [array, data], shared=8192).check()
    expected = np.full(shape, 9, np.uint16)
    for index in np.ndindex(*box):
        place = tuple(s + i for s, i in zip(start, index, strict=True))
        if all(p < n for p, n in zip(place, shape, strict=True)):
            expected[place] = data.reshape(box)[index]
    np.testing.assert_array_equal(tensor, expected)


# ---- wgmma ---------------------------------------------------------------------------------

K = {"bf16": 16, "f16": 16, "tf32": 8}


def place(matrix: np.ndarray, kind: str, descriptor: SmemDescriptor, mn_major: bool) -> np.ndarray:
    """Shared memory that holds a matrix [rows, k] as the descriptor says."""
    image = np.zeros(16384, np.uint8)
    elements = image.view(np.uint32 if kind == "tf32" else np.uint16)
    at = operand_addresses(descriptor, *matrix.shape, kind, mn_major)
    elements[(at - 1024) // elements.itemsize] = matrix
    return image


@pytest.mark.parametrize(
    ("kind", "d_type", "n", "swizzle", "mn_major", "in_registers"),
    [
        ("bf16", "f32", 8, Swizzle.B128, False, False),
        ("bf16", "f32", 64, Swizzle.B128, True, False),
        ("bf16", "f32", 24, Swizzle.B32, False, True),
        ("bf16", "f32", 256, Swizzle.B64, False, False),
        ("f16", "f16", 40, Swizzle.B128, False, False),
        ("f16", "f32", 64, Swizzle.NONE, True, True),
        ("bf16", "f32", 32, Swizzle.B128, False, False),
        ("bf16", "f32", 128, Swizzle.B128, False, False),
        ("f16", "f32", 128, Swizzle.B128, False, False),
        ("f16", "f32", 256, Swizzle.B64, False, False),
        ("bf16", "f32", 16, Swizzle.B128, False, False),
        ("f16", "f32", 16, Swizzle.B128, False, False),
        ("tf32", "f32", 64, Swizzle.B32, False, False),
        ("tf32", "f32", 16, Swizzle.B32, False, False),
        ("tf32", "f32", 48, Swizzle.B64, False, True),
    ],
)
def test_wgmma(kind, d_type, n, swizzle, mn_major, in_registers) -> None:
    rng = np.random.default_rng(n)
    k = K[kind]
    storage = "f32" if kind == "tf32" else kind
    a, b = (
        from_float(rng.integers(-4, 5, (rows, k)).astype(np.float32), storage) for rows in (64, n)
    )
    span, rows_128 = swizzle.span, 8192
    stride = 8 * span if not mn_major or swizzle != Swizzle.NONE else 256
    leading = 128 if swizzle == Swizzle.NONE else 2048
    if mn_major and swizzle == Swizzle.NONE:
        leading, stride = 1024, 128
    describe = SmemDescriptor(1024, leading, stride, 0, swizzle)
    a_major = mn_major and not in_registers
    image = np.concatenate(
        [place(a, kind, describe, a_major)[:rows_128], place(b, kind, describe, mn_major)]
    )
    registers = n // (4 if d_type == "f16" else 2)
    out = np.zeros((128, registers), np.uint32)
    text = kernel(
        _multiply(kind, d_type, n, k, mn_major, in_registers, registers, len(image)),
        4,
        declarations=SMEM,
    )
    fragment = _a_registers(a, kind)
    descriptors = np.array(
        [
            encode_descriptor(describe),
            encode_descriptor(describe._replace(start_address=1024 + rows_128)),
        ],
        np.uint64,
    )
    run(
        text, "k", 1, 128, [image, fragment, descriptors, Uninitialised(out)], shared=len(image)
    ).check()
    truth = to_float(a, storage).astype(np.float64) @ to_float(b, storage).T
    table = accumulator_table(n, d_type)
    got = out[..., None].view(np.uint16 if d_type == "f16" else np.uint32)
    np.testing.assert_array_equal(to_float(got, d_type), truth[table.row, table.col])


FILL = """mov.u32 %r50, smem; mad.lo.s32 %r60, %t, 32, %r50; mov.b32 %r1, 0;
    st.shared.v4.b32 [%r60], {%r1, %r1, %r1, %r1};
    st.shared.v4.b32 [%r60+16], {%r1, %r1, %r1, %r1};
    mov.b32 %r70, 0; mov.b32 %r71, 0; mov.b32 %r72, 0; mov.b32 %r73, 0;
    fence.proxy.async.shared::cta; bar.sync 0; setp.ne.b32 %p1, 0, 0;
    wgmma.fence.sync.aligned;"""
COMMIT, WAIT_ALL = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
FENCE, WAIT_ONE = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 1;"


def _step(first: int, a: str = "DESCRIPTOR", scale_d: str = "%p1") -> str:
    """One m64n8k16 with the accumulators %r{first}..; A from shared memory or registers."""
    d = ", ".join(f"%r{first + i}" for i in range(4))
    trans = "0, 0" if a == "DESCRIPTOR" else "0"
    return (
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{d}}}, {a}, DESCRIPTOR, {scale_d},"
        f" 1, 1, {trans};"
    )


FRAGMENT = "{%r70, %r71, %r72, %r73}"


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        # wait_group 1: the older group is complete, the newer is not
        (_step(100) + COMMIT + _step(110) + COMMIT + WAIT_ONE + "mov.b32 %r2, %r100;", set()),
        (
            _step(100) + COMMIT + _step(110) + COMMIT + WAIT_ONE + "mov.b32 %r2, %r110;",
            {"in-flight"},
        ),
        # the wait covers committed groups only
        (_step(100) + WAIT_ALL + "mov.b32 %r2, %r100;", {"in-flight"}),
        # fragments of A belong to the operation until the wait
        (_step(100, FRAGMENT) + COMMIT + "mov.b32 %r70, 1;", {"in-flight"}),
        (_step(100, FRAGMENT) + COMMIT + WAIT_ALL + "mov.b32 %r70, 1;", set()),
        (_step(70) + COMMIT + _step(100, FRAGMENT) + COMMIT, {"in-flight"}),
        # scale-d is read when the operation is issued, not when it runs
        (_step(100) + COMMIT + "setp.eq.b32 %p1, 0, 0;", set()),
        # wgmma.fence: "between a register access ... and any wgmma.mma_async that accesses the
        # same registers", but not between accumulators of the same shape
        (_step(100) + _step(100, scale_d="%p2") + COMMIT, set()),
        (
            _step(100) + COMMIT + WAIT_ALL + "mov.b32 %r100, %r1;" + _step(100) + COMMIT,
            {"missing-fence"},
        ),
        (
            _step(100) + COMMIT + WAIT_ALL + "mov.b32 %r100, %r1;" + FENCE + _step(100) + COMMIT,
            set(),
        ),
        (
            _step(100) + COMMIT + "mov.b32 %r70, 1;" + _step(110, FRAGMENT) + COMMIT,
            {"missing-fence"},
        ),
        (_step(100) + COMMIT + "mov.b32 %r70, 1;" + FENCE + _step(110, FRAGMENT) + COMMIT, set()),
    ],
)
def test_registers_of_wgmma(body: str, kinds: set[str]) -> None:
    value = encode_descriptor(SmemDescriptor(1024, 128, 256, 0, Swizzle.NONE))
    text = FILL + "setp.eq.b32 %p2, 0, 0; mov.b64 %d11, VALUE;" + body + WAIT_ALL
    text = text.replace("VALUE", str(value)).replace("DESCRIPTOR", "%d11")
    for schedule in (Schedule(), Schedule("reversed", "late")):
        report = run(
            kernel(text, 0, declarations=SMEM), "k", 1, 128, [], shared=4096, schedule=schedule
        )
        assert report.kinds() == kinds


def _a_registers(a: np.ndarray, kind: str) -> np.ndarray:
    """Four registers per thread: rows t/4 and t/4 + 8 of its warp, then the upper half of k."""
    t = np.arange(128)
    row, column = 16 * (t // 32) + t % 32 // 4, t % 4
    pick = [(row + 8 * (i % 2), column + 4 * (i // 2)) for i in range(4)]
    words = np.ascontiguousarray(a).view(np.uint32)  # pairs of 16-bit elements, or tf32 itself
    return np.stack([words[r, c] for r, c in pick], axis=1)


def _multiply(kind, d_type, n, k, mn_major, in_registers, registers, size) -> str:
    d = ", ".join(f"%r{100 + i}" for i in range(registers))
    a = "{%r70, %r71, %r72, %r73}" if in_registers else "%d10"
    trans = (
        ""
        if kind == "tf32"
        else f", {int(mn_major)}"
        if in_registers
        else f", {int(mn_major)}, {int(mn_major)}"
    )
    copies = "".join(
        f"""ld.global.v4.b32 {{%r62, %r63, %r64, %r65}}, [%d21+{i}];
        st.shared.v4.b32 [%r61+{i}], {{%r62, %r63, %r64, %r65}};"""
        for i in range(0, size, 2048)
    )
    stores = "".join(f"st.global.b32 [%d23+{4 * i}], %r{100 + i};" for i in range(registers))
    return f"""mov.u32 %r50, smem; shl.b32 %r60, %t, 4; cvt.u64.u32 %d20, %r60;
        add.s64 %d21, %a0, %d20; add.s32 %r61, %r60, %r50; {copies}
        add.s64 %d22, %a1, %d20; ld.global.v4.b32 {{%r70, %r71, %r72, %r73}}, [%d22];
        ld.global.v2.b64 {{%d10, %d11}}, [%a2];
        fence.proxy.async.shared::cta; bar.sync 0; setp.ne.b32 %p1, 0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d_type}.{kind}.{kind} {{{d}}}, {a}, %d11,
            %p1, 1, 1{trans};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %d24, %t, {4 * registers}; add.s64 %d23, %a3, %d24; {stores}"""
