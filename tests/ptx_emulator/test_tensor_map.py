"""Tensor maps: encoding, edits, the driver's checks and the boxes they describe."""

import itertools

import numpy as np
import pytest

from .layouts import IllegalOperand, Swizzle
from .tensor_map import TensorMap, decode, encode_tiled, fill_bits, replace_field, tile_box

GOOD = {
    "element_type": "bf16",
    "global_address": 0x7000_0000_1000,
    "global_dim": (100, 60),
    "global_stride": (224,),
    "box_dim": (64, 32),
    "swizzle": Swizzle.B128,
}


def test_round_trip() -> None:
    m = decode(encode_tiled(**GOOD))
    assert m == TensorMap(
        *("bf16", 0x7000_0000_1000, (100, 60), (224,), (64, 32), (1, 1)),
        swizzle=Swizzle.B128,
    )
    assert (m.rank, m.element_bytes, m.box_bytes) == (2, 2, 4096)
    five = encode_tiled("u8", 64, (2**32, 2, 3, 4, 5), (16, 2**40 - 16, 32, 48), (16, 1, 2, 3, 256))
    assert decode(five).global_dim == (2**32, 2, 3, 4, 5)
    assert decode(np.frombuffer(five, np.uint8)).global_stride == (16, 2**40 - 16, 32, 48)


def test_replace_builds_a_map_from_zeros() -> None:
    """The sequence of edits that Triton emits for tl.make_tensor_descriptor."""
    raw = bytes(128)
    with pytest.raises(IllegalOperand, match="global_dim"):
        decode(raw)
    edits = [
        ("global_address", None, 0x7000_0000_1000),
        ("rank", None, 1),
        *(("box_dim", 0, 64), ("box_dim", 1, 32)),
        *(("global_dim", 0, 100), ("global_dim", 1, 60)),
        ("global_stride", 0, 224),
        *(("element_stride", 0, 1), ("element_stride", 1, 1)),
        ("elemtype", None, 10),
        ("interleave_layout", None, 0),
        ("swizzle_mode", None, 3),
        ("fill_mode", None, 0),
    ]
    for field, ordinal, value in edits:
        raw = replace_field(raw, field, value, ordinal)
    assert raw == encode_tiled(**GOOD)
    nan = decode(replace_field(raw, "fill_mode", 1))
    assert nan.nan_fill
    assert fill_bits(nan) == 0x7FFF
    assert fill_bits(decode(raw)) == 0
    with pytest.raises(IllegalOperand, match="swizzle"):
        tile_box(decode(replace_field(raw, "swizzle_mode", 1)), (0, 0), 0)
    atoms = decode(replace_field(raw, "swizzle_atomicity", 1))
    assert atoms.swizzle == Swizzle.B128_ATOM32


@pytest.mark.parametrize(
    ("field", "value", "ordinal", "message"),
    [
        ("global_dims", 1, 0, "no field"),
        ("global_dim", 1, None, "operands"),
        ("rank", 1, 0, "operands"),
        ("global_dim", 1, 5, "ordinals 0 to 4"),
        ("global_stride", 16, 4, "ordinals 0 to 3"),
        ("rank", 5, None, "no value 5"),
        ("elemtype", 13, None, "no value 13"),
        ("swizzle_mode", 4, None, "no value 4"),
        ("box_dim", 0, 0, "cannot hold 0"),
    ],
)
def test_replace_refuses(field: str, value: int, ordinal: int | None, message: str) -> None:
    with pytest.raises(IllegalOperand, match=message):
        replace_field(encode_tiled(**GOOD), field, value, ordinal)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element_type": "f8"}, "element type"),
        ({"global_dim": (), "global_stride": (), "box_dim": ()}, "rank"),
        ({"global_stride": (224, 224)}, "rank 2"),
        ({"interleave": 16}, "rank 3"),
        ({"global_address": 0x1008}, "16-aligned"),
        ({"global_dim": (0, 60)}, r"global_dim\[0\]"),
        ({"global_dim": (100, 2**32 + 1)}, r"global_dim\[1\]"),
        ({"global_stride": (200,)}, "multiple of 16"),
        ({"global_stride": (2**40,)}, r"global_stride\[0\]"),
        ({"box_dim": (64, 257)}, r"box_dim\[1\]"),
        ({"box_dim": (60, 32)}, "multiple of 16"),
        ({"box_dim": (72, 32)}, "exceeds the 128-byte"),
        ({"element_stride": (1, 9)}, r"element_stride\[1\]"),
        ({"element_type": "u16", "nan_fill": True}, "no NaN"),
    ],
)
def test_encode_refuses(change: dict, message: str) -> None:
    with pytest.raises(IllegalOperand, match=message):
        encode_tiled(**GOOD | change)


def test_garbage_is_not_a_map() -> None:
    for raw in (bytes([255]) * 128, bytes(127)):
        with pytest.raises(IllegalOperand):
            decode(raw)


def test_box_by_hand() -> None:
    """A 64 x 32 box of a 100 x 60 tensor at column 40, row -1, placed on a 1024-byte boundary."""
    box = tile_box(decode(encode_tiled(**GOOD)), (40, -1), 0x400)
    at = {(row, col): row * 64 + col for row in range(32) for col in range(64)}
    base = 0x7000_0000_1000
    assert not box.in_bounds[at[0, 5]]  # row -1
    assert box.in_bounds[at[1, 0]]
    assert box.global_address[at[1, 0]] == base + 80
    assert box.global_address[at[2, 3]] == base + 224 + 86
    assert box.in_bounds[at[31, 59]]  # row 30, column 99
    assert not box.in_bounds[at[31, 60]]
    assert box.shared_address[at[0, 9]] == 0x400 + 18
    assert box.shared_address[at[1, 0]] == 0x400 + 128 + 16
    assert box.shared_address[at[9, 8]] == 0x400 + 9 * 128
    assert box.in_bounds.sum() == 31 * 60
    assert box.element_bytes == 2


@pytest.mark.parametrize("mode", [Swizzle.B32, Swizzle.B64, Swizzle.B128])
def test_swizzle_belongs_to_absolute_addresses(mode: Swizzle) -> None:
    """CUDA programming guide: smem[y][x] <-> smem[y][((y + offset) % 8) ^ x] and its like."""
    m = decode(encode_tiled("u8", 0, (mode.span, 64), (128,), (mode.span, 64), swizzle=mode))
    lines = {Swizzle.B32: 2, Swizzle.B64: 4, Swizzle.B128: 8}[mode]
    for start in range(0, 1024, 128):
        placed = tile_box(m, (0, 0), start).shared_address - start
        for linear in range(0, mode.span * 64, 16):
            y, x = divmod(linear // 16, 8)
            assert placed[linear] == y * 128 + 16 * (((y + start // 128) % lines) ^ x)


def brute_force(m: TensorMap, coords: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """The box by nested loops, dimension 0 innermost."""
    ranges = [range(0, b, s) for b, s in zip(m.box_dim, m.element_stride, strict=True)]
    addresses, inside = [], []
    for steps in itertools.product(*reversed(ranges)):
        position = [c + s for c, s in zip(coords, reversed(steps), strict=True)]
        strides = (m.element_bytes, *m.global_stride)
        addresses.append(sum(p * s for p, s in zip(position, strides, strict=True)))
        inside.append(all(0 <= p < n for p, n in zip(position, m.global_dim, strict=True)))
    return addresses, inside


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_boxes_of_every_rank(rank: int) -> None:
    rng = np.random.default_rng(rank)
    for _ in range(20):
        dims = tuple(int(n) for n in rng.integers(1, 40, rank))
        box = (int(rng.integers(1, 5)) * 8, *(int(n) for n in rng.integers(1, 7, rank - 1)))
        steps = (1, *(int(n) for n in rng.integers(1, 4, rank - 1)))
        strides = tuple(int(n) * 16 for n in rng.integers(1, 500, rank - 1))
        m = decode(encode_tiled("f16", 0, dims, strides, box, steps))
        coords = tuple(int(n) for n in rng.integers(-10, 40, rank))
        found = tile_box(m, coords, 256)
        addresses, inside = brute_force(m, coords)
        assert (found.in_bounds == inside).all()
        assert found.global_address.tolist() == addresses
        assert (found.shared_address == 256 + 2 * np.arange(len(addresses))).all()
        assert m.box_bytes == 2 * len(addresses)


def test_store_clips() -> None:
    m = decode(encode_tiled("u32", 0, (6, 3), (32,), (8, 2)))
    box = tile_box(m, (4, 2), 0, store=True)
    memory = np.zeros(64, np.uint32)
    memory[box.global_address[box.in_bounds] // 4] = 1 + np.flatnonzero(box.in_bounds)
    assert np.flatnonzero(memory).tolist() == [2 * 8 + 4, 2 * 8 + 5]
    assert memory[20:22].tolist() == [1, 2]
    with pytest.raises(IllegalOperand, match="store cannot start"):
        tile_box(m, (-1, 0), 0, store=True)


def test_box_refuses() -> None:
    m = decode(encode_tiled(**GOOD))
    with pytest.raises(IllegalOperand, match="128-aligned"):
        tile_box(m, (0, 0), 64)
    with pytest.raises(IllegalOperand, match="coordinates"):
        tile_box(m, (0, 0, 0), 0)
    narrow = decode(encode_tiled(**GOOD | {"box_dim": (32, 32)}))
    with pytest.raises(IllegalOperand, match="64-byte rows"):
        tile_box(narrow, (0, 0), 0)
    interleaved = encode_tiled("u8", 0, (16, 8, 8), (16, 128), (16, 8, 8), interleave=16)
    with pytest.raises(IllegalOperand, match="interleaved"):
        tile_box(decode(interleaved), (0, 0, 0), 0)
