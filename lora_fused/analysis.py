"""What an adapter has learned: the measures of section 7 of the LoRA paper (arXiv 2106.09685).

    subspace_similarity(A_8, A_64)      φ(i, j): do two adapters share their leading directions?
    amplification(W, A, B, scaling)     how far does ΔW lift directions that W has, but weakly?

Everything is computed in float64 on the CPU; ΔW = scaling · B A is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Amplification(NamedTuple):
    """The row of the paper's Table 7 for one weight and one adapter. All are Frobenius norms.

    onto_delta, onto_weight, onto_random: ‖Uᵀ W V‖ with U and V the leading R left and right
    singular vectors of ΔW, of W itself, and of a Gaussian matrix. factor = delta / onto_delta.
    """

    weight: float
    delta: float
    onto_delta: float
    onto_weight: float
    onto_random: float
    factor: float


def subspace_similarity(first: Tensor, second: Tensor, side: str = "right") -> Tensor:
    """φ(i, j) = ‖U_iᵀ V_j‖²_F / min(i, j) in [0, 1], for i = 1..rank(first), j = 1..rank(second).

    U_i holds the leading i singular vectors of `first`, V_j the leading j of `second`: 1 where the
    smaller of the two subspaces lies inside the larger, 0 where they are orthogonal (equation 4 of
    the paper, from the Grassmann distance).

    Args:
        first, second: matrices of equal width (side "right", for lora_A [R, K]) or of equal height
            (side "left", for lora_B [N, R]).
        side: whose singular vectors are compared, "right" or "left".

    Returns:
        float64 [I, J], element [i − 1, j − 1] being φ(i, j).

    Raises:
        ValueError: sizes that do not fit, or another side.
    """
    u, v = _leading_vectors(first, side), _leading_vectors(second, side)
    if u.shape[0] != v.shape[0]:
        axis = "width" if side == "right" else "height"
        raise ValueError(
            f"subspace_similarity: the matrices are {list(first.shape)} and {list(second.shape)}, "
            f"expected equal {axis}s."
        )
    overlap = (u.mT @ v).square().cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1)
    j = torch.arange(1, overlap.shape[1] + 1)
    return overlap / torch.minimum(i[:, None], j[None, :])


def amplification(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, seed: int = 0
) -> Amplification:
    """How the adapter's update relates to the weight it is added to (section 7.3 of the paper).

    weight [N, K], lora_A [R, K], lora_B [N, R]. `seed` is of the Gaussian matrix. Raises ValueError
    for shapes that do not fit and for an adapter that is zero, which has no directions.
    """
    N, K = weight.shape
    R = lora_A.shape[0]
    if lora_A.shape != (R, K) or lora_B.shape != (N, R) or R == 0:
        raise ValueError(
            f"amplification: weight is {list(weight.shape)}, lora_A {list(lora_A.shape)}, lora_B "
            f"{list(lora_B.shape)}, expected [N, K], [R, K] and [N, R] with R > 0."
        )
    w = _double(weight)
    left, sizes, right = _svd_of_update(_double(lora_A), _double(lora_B) * scaling)
    if sizes[0] == 0:
        raise ValueError("amplification: the adapter is zero, expected a trained one.")
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    gauss = torch.Generator().manual_seed(seed)
    random = torch.randn(N, K, generator=gauss, dtype=torch.float64)
    ru, _, rvh = torch.linalg.svd(random, full_matrices=False)
    delta, onto_delta = float(sizes.norm()), float((left.mT @ w @ right).norm())
    return Amplification(
        weight=float(w.norm()),
        delta=delta,
        onto_delta=onto_delta,
        onto_weight=float((u[:, :R].mT @ w @ vh[:R].mT).norm()),
        onto_random=float((ru[:, :R].mT @ w @ rvh[:R].mT).norm()),
        factor=delta / onto_delta if onto_delta > 0 else float("inf"),
    )


def _leading_vectors(matrix: Tensor, side: str) -> Tensor:
    """Singular vectors as columns, the leading first."""
    if side not in ("left", "right"):
        raise ValueError(f"subspace_similarity: side is {side!r}, expected 'left' or 'right'.")
    u, _, vh = torch.linalg.svd(_double(matrix), full_matrices=False)
    return vh.mT if side == "right" else u


def _svd_of_update(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of b a without forming it: left [N, R], singular values [R], right [K, R]."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    u, sizes, vh = torch.linalg.svd(rb @ ra.mT)
    return qb @ u, sizes, qa @ vh.mT


def _double(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)
