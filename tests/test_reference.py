"""The reference itself: its generator against published vectors, its gradients against autograd."""

import pytest
import torch

from lora_fused.reference import (
    dropout_threshold,
    effective_scaling,
    keep_mask,
    lora_linear_backward_ref,
    lora_linear_ref,
    philox_4x32,
)

WORD = 0xFFFFFFFF


def scalar_philox(seed: int, index: int, rounds: int = 7) -> list[int]:
    """Philox4x32 on Python integers, written from the paper."""
    k = [seed & WORD, seed >> 32 & WORD]
    c = [index & WORD, index >> 32 & WORD, 0, 0]
    for round_number in range(rounds):
        if round_number:
            k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & WORD, p0 >> 32 ^ c[3] ^ k[1], p0 & WORD]
    return c


def scalar_keep(seed: int, row: int, col: int, cols: int, p: float) -> bool:
    words = scalar_philox(seed, row * -(-cols // 8) + col // 8)
    e = col % 8
    return (words[e >> 1] >> (16 * (e & 1)) & 0xFFFF) >= round(p * 65536)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_known_answers_of_random123(rounds: int, expected: list[int]) -> None:
    words = philox_4x32(0, torch.zeros(1, dtype=torch.int64), rounds)
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, (1 << 64) - 1])
def test_words_equal_scalar_philox(seed: int) -> None:
    index = torch.tensor([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 62) + 12345])
    words = torch.stack(philox_4x32(seed, index), 1).tolist()
    assert words == [scalar_philox(seed, int(i)) for i in index]


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_mask_equals_scalar_definition(cols: int, p: float) -> None:
    mask = keep_mask(77, 5, cols, p)
    assert mask.shape == (5, cols)
    expected = [[scalar_keep(77, row, col, cols, p) for col in range(cols)] for row in range(5)]
    assert mask.tolist() == expected


def test_mask_beyond_two_to_the_31_elements() -> None:
    """A far row: row · cols needs 36 bits and the counter 33."""
    far, cols = 1 << 25, 2999
    mask = keep_mask(5, 2, cols, 0.5, row_offset=far)
    for row in range(2):
        for col in (0, 1, 7, 8, 1500, 2998):
            assert mask[row, col].item() == scalar_keep(5, far + row, col, cols, 0.5)


def test_row_offset_is_a_slice_whatever_the_chunks() -> None:
    whole = keep_mask(9, 70, 8 * 4096, 0.3)
    assert torch.equal(whole[33:64], keep_mask(9, 31, 8 * 4096, 0.3, row_offset=33))


def test_seed_as_tensor_and_as_number_agree() -> None:
    seed = 0x8123456789ABCDEF
    tensor = torch.tensor(seed - (1 << 64))
    assert torch.equal(keep_mask(seed, 9, 50, 0.5), keep_mask(tensor, 9, 50, 0.5))


def test_threshold_and_scaling() -> None:
    assert [dropout_threshold(p) for p in (0.0, 1e-6, 0.05, 0.5, 1.0)] == [0, 0, 3277, 32768, 65536]
    assert effective_scaling(2.0, 0.5) == 4.0
    assert effective_scaling(2.0, 1.0) == 0.0
    assert effective_scaling(3.0, 0.05) == 3.0 / (1 - 3277 / 65536)


@pytest.mark.parametrize("dropout", [False, True])
def test_backward_formulas_equal_autograd(dropout: bool) -> None:
    shapes = {"x": (6, 10), "w": (7, 10), "a": (3, 10), "b": (7, 3), "bias": (7,)}
    t = {k: torch.randn(s, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}
    keep = keep_mask(3, 6, 10, 0.4) if dropout else None
    y, _ = lora_linear_ref(t["x"], t["w"], t["a"], t["b"], 1.7, t["bias"], keep)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(t.values()), dy)
    got = lora_linear_backward_ref(dy, t["x"], t["w"], t["a"], t["b"], 1.7, keep)
    for mine, autograds in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, autograds)


def test_forward_equals_the_formula_of_the_paper() -> None:
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), (5, 6), (2, 6), (5, 2)))
    y, s = lora_linear_ref(x, w, a, b, 0.5)
    torch.testing.assert_close(y, x @ (w + 0.5 * b @ a).T)
    torch.testing.assert_close(s, 0.5 * x @ a.T)
