"""The compiler's own arithmetic (`kernels/arithmetic.cu`) against torch and exact integers."""

from __future__ import annotations

import numpy as np
import torch

from . import run
from .testing import bits, module


def test_elementary_functions() -> None:
    x = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
    y = torch.zeros_like(x)
    run(module("arithmetic"), "functions", 1, 64, [bits(x), bits(y)]).check()
    v = x.double()
    truth = 2 * v.exp() + 2 * v.log() + v.sqrt() + v.rsqrt() + 1 / v + v.tanh() + v.erf() + v**1.5
    truth += v.clamp(max=2) + v.floor() + v.ceil() + v.trunc() + v.round() + v.fmod(0.75) + v / 3
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=0.0)


def test_sine_with_its_slow_path() -> None:
    x = torch.tensor([0.5, 3.0, 100.0, 1e6, -7.5, 1e9, -3e20, 0.0])
    y = torch.zeros_like(x)
    run(module("arithmetic"), "sine", 1, 8, [bits(x), bits(y)]).check()
    torch.testing.assert_close(y.double(), x.double().sin(), rtol=2e-7, atol=1e-7)


def test_wide_integers() -> None:
    values = [1, 2**63 + 5, 0xDEADBEEFCAFEF00D, 12345678901234567]
    x, y = np.array(values, np.uint64), np.zeros(4, np.uint64)
    run(module("arithmetic"), "wide", 1, 4, [x, y, 1234567]).check()
    for v, got in zip(values, y.tolist(), strict=True):
        counts = v.bit_count() + 64 - v.bit_length() + (v & -v).bit_length()
        reverse = int(f"{v:064b}"[::-1], 2)
        assert got == (v // 1234567 + v % 7 + (v * v >> 64) + counts + reverse) % 2**64


def test_packed_bf16_rounds_every_step() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = torch.zeros_like(x)
    run(module("arithmetic"), "packed", 1, 32, [bits(x), bits(y)]).check()
    v = x.double()
    inner = (v + (v * v).bfloat16().double()).bfloat16().double()
    assert torch.equal(y, torch.maximum((v * v + inner).bfloat16(), x))


def test_double_precision() -> None:
    x = torch.rand(32, dtype=torch.float64) * 9 + 1
    y = torch.zeros_like(x)
    run(module("arithmetic"), "doubles", 1, 32, [bits(x), bits(y)]).check()
    truth = x.sqrt() + 1 / x + (x * 3 - x.floor()) + x.trunc()
    torch.testing.assert_close(y, truth, rtol=1e-15, atol=1e-14)
