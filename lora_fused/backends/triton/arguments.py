"""The arguments of the kernels, one tuple per member of a launch; host and device share them.

A launch serves one layer or several (q/k/v, gate/up): the kernels take a tuple of these. Strides
are in elements and named tensor_s<dimension>. None and strides of 1 become constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Shrink(NamedTuple):
    """s [M, R] = scale · (mask ⊙ x) aᵀ; x [M, K], a [R, K], seed of the mask or None.

    k_per_part: the contraction of one block, a multiple of its steps. With several parts s is a
    workspace of fp32 partial sums, s_sp apart.
    """

    x: Any
    a: Any
    s: Any
    seed: Any
    threshold: Any
    scale: Any
    K: Any
    R: Any
    k_per_part: Any
    x_sm: Any
    x_sk: Any
    a_sr: Any
    a_sk: Any
    s_sm: Any
    s_sp: Any


class Reduce(NamedTuple):
    """out [C, R] = (mask ⊙ z)ᵀ t; z [M, C] wide, t [M, R] with unit stride along R.

    With several parts of the tokens out is a workspace of fp32 partial sums, out_sp apart.
    """

    z: Any
    t: Any
    out: Any
    seed: Any
    threshold: Any
    C: Any
    R: Any
    z_sm: Any
    z_sc: Any
    t_sm: Any
    out_sc: Any
    out_sr: Any
    out_sp: Any


class Sum(NamedTuple):
    """out [rows, cols] = scale · Σ_p partial [p, rows, cols], dense but for the rows of out."""

    partial: Any
    out: Any
    scale: Any
    rows: Any
    cols: Any
    out_stride: Any


class Matmul(NamedTuple):
    """y [M, N] (+)= x [M, K] w [K, N] + mask ⊙ (s [M, R] l [R, N]) + bias [N].

    x, w and y are tensors or tensor descriptors. With a [R, K] the kernel makes s = scale · x aᵀ
    itself and stores it. s and l are None for rank 0; a, bias and seed may be None. s and y have
    unit stride along R and N.
    """

    x: Any
    w: Any
    a: Any
    s: Any
    l: Any
    bias: Any
    y: Any
    seed: Any
    threshold: Any
    scale: Any
    N: Any
    K: Any
    R: Any
    x_sm: Any
    x_sk: Any
    w_sk: Any
    w_sn: Any
    a_sr: Any
    a_sk: Any
    s_sm: Any
    l_sr: Any
    l_sn: Any
    y_sm: Any
