"""The measures of the LoRA paper's section 7, on matrices whose answers are known."""

from __future__ import annotations

import pytest
import torch

from lora_fused.analysis import amplification, subspace_similarity


def test_a_matrix_shares_every_subspace_with_itself() -> None:
    phi = subspace_similarity(a := torch.randn(8, 40), a)
    assert phi.shape == (8, 8) and phi.dtype == torch.float64
    torch.testing.assert_close(phi, torch.ones_like(phi))


def test_a_subspace_inside_a_larger_one() -> None:
    big = torch.linalg.qr(torch.randn(40, 12, dtype=torch.float64))[0].mT
    sizes = torch.arange(12, 0, -1.0, dtype=torch.float64)
    phi = subspace_similarity(big[:3], sizes[:, None] * big)
    torch.testing.assert_close(phi[2, 2:], torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(phi[2, 1], torch.tensor(1.0, dtype=torch.float64))
    assert phi[2, 0] == pytest.approx(1.0)  # one direction, inside all three


def test_orthogonal_subspaces_share_nothing() -> None:
    basis = torch.linalg.qr(torch.randn(30, 10))[0].mT
    assert subspace_similarity(basis[:4], basis[4:]).max() < 1e-10


def test_by_definition() -> None:
    a, b = torch.randn(4, 20).double(), torch.randn(6, 20).double()
    u, v = (torch.linalg.svd(m, full_matrices=False)[2] for m in (a, b))
    phi = subspace_similarity(a, b)
    for i, j in ((1, 1), (2, 5), (4, 3)):
        want = (u[:i] @ v[:j].mT).square().sum() / min(i, j)
        assert phi[i - 1, j - 1] == pytest.approx(float(want))


def test_left_vectors_are_those_of_the_transpose() -> None:
    a, b = torch.randn(20, 4), torch.randn(20, 6)
    left, right = subspace_similarity(a, b, side="left"), subspace_similarity(a.T, b.T)
    torch.testing.assert_close(left, right)


def test_amplification_by_definition() -> None:
    w, a, b = torch.randn(24, 16), torch.randn(3, 16), torch.randn(24, 3)
    got = amplification(w, a, b, scaling=0.5)
    w64 = w.double()
    u, sizes, vh = torch.linalg.svd(0.5 * b.double() @ a.double())
    onto = (u[:, :3].T @ w64 @ vh[:3].T).norm()
    assert got.onto_delta == pytest.approx(float(onto))
    assert got.delta == pytest.approx(float(sizes.norm()))
    assert got.factor == pytest.approx(got.delta / got.onto_delta)
    assert got.weight == pytest.approx(float(w64.norm()))
    assert got.onto_weight == pytest.approx(float(torch.linalg.svdvals(w64)[:3].norm()))
    assert got.onto_random < got.onto_weight


def test_an_update_along_the_weights_own_directions() -> None:
    """ΔW = the leading part of W: nothing is amplified, the projection is that part itself."""
    w = torch.randn(20, 12, dtype=torch.float64)
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
    got = amplification(w, vh[:2], u[:, :2] * sizes[:2], scaling=1.0)
    assert got.onto_delta == pytest.approx(got.onto_weight) == pytest.approx(got.delta)
    assert got.factor == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: subspace_similarity(torch.ones(2, 3), torch.ones(2, 4)),
            "subspace_similarity: the matrices are [2, 3] and [2, 4], expected equal widths.",
        ),
        (
            lambda: subspace_similarity(torch.ones(2, 3), torch.ones(2, 3), side="top"),
            "subspace_similarity: side is 'top', expected 'left' or 'right'.",
        ),
        (
            lambda: amplification(torch.ones(4, 3), torch.ones(2, 3), torch.ones(5, 2), 1.0),
            "amplification: weight is [4, 3], lora_A [2, 3], lora_B [5, 2], expected [N, K], "
            "[R, K] and [N, R] with R > 0.",
        ),
        (
            lambda: amplification(torch.ones(4, 3), torch.ones(2, 3), torch.zeros(4, 2), 1.0),
            "amplification: the adapter is zero, expected a trained one.",
        ),
    ],
)
def test_refusals(call, sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        call()
    assert str(refusal.value) == sentence
