"""Dropout: the generator as random numbers, the same bits everywhere, replay, and where it acts.

Every statistical test has a fixed seed and so is deterministic; the bounds are at 5 standard
deviations.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_fused import FusedLoRALinear, functional, lora_linear
from lora_fused.backends import cpu
from lora_fused.config import Mask
from lora_fused.reference import dropout_threshold, keep_mask, philox_4x32
from lora_fused.testing import check_case, make_case
from tests.conftest import Path, native_isas

ROWS, COLS = 512, 2048


def uniforms(seed: int, count: int) -> torch.Tensor:
    """The 16-bit numbers behind the mask, scaled to [0, 1)."""
    words = torch.stack(philox_4x32(seed, torch.arange(count // 8)), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten().double() / 65536


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1].item()


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 63) + 7])
def test_moments_of_the_bits(seed: int) -> None:
    u = uniforms(seed, 1 << 20)
    n = u.numel()
    assert abs(u.mean().item() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(u, bins=256, min=0, max=1)
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [3, 4])
def test_keep_fraction(p: float, seed: int) -> None:
    mask = keep_mask(seed, ROWS, COLS, p).double()
    sigma = math.sqrt(p * (1 - p))
    n = mask.numel()
    assert abs(mask.mean().item() - (1 - dropout_threshold(p) / 65536)) < 5 * sigma / math.sqrt(n)
    for dim, size in ((0, ROWS), (1, COLS)):  # no row and no column is special
        deviation = (mask.mean(dim) - (1 - p)).abs().max().item()
        assert deviation < 5.5 * sigma / math.sqrt(size)


@pytest.mark.parametrize("lag", [1, 2, 7, 8, 9, 64, 1000])
def test_no_serial_correlation(lag: int) -> None:
    mask = keep_mask(11, ROWS, COLS, 0.5)
    along_columns = correlation(mask[:, lag:], mask[:, :-lag])
    assert abs(along_columns) < 5 / math.sqrt(ROWS * (COLS - lag))
    if lag < ROWS:
        along_rows = correlation(mask[lag:], mask[:-lag])
        assert abs(along_rows) < 5 / math.sqrt((ROWS - lag) * COLS)


def test_no_correlation_between_any_two_rows_or_columns() -> None:
    mask = keep_mask(12, 256, 4096, 0.5).double()
    rows = torch.corrcoef(mask).fill_diagonal_(0)
    assert rows.abs().max().item() < 6 / math.sqrt(4096)
    columns = torch.corrcoef(keep_mask(13, 4096, 256, 0.5).double().T).fill_diagonal_(0)
    assert columns.abs().max().item() < 6 / math.sqrt(4096)


def test_neighbouring_and_related_seeds_are_independent() -> None:
    base = keep_mask(1000, ROWS, COLS, 0.5)
    related = [1001, 999, 1000 + (1 << 32), 1000 ^ (1 << 63), 2000]
    for seed in related:
        other = keep_mask(seed, ROWS, COLS, 0.5)
        assert abs(correlation(base, other)) < 5 / math.sqrt(base.numel()), seed


def test_seed_avalanche() -> None:
    """Flipping any one bit of the seed flips half of the output bits."""
    index = torch.arange(2048)
    base = torch.stack(philox_4x32(99, index))
    bits = base.numel() * 32
    for bit in range(64):
        changed = base ^ torch.stack(philox_4x32(99 ^ (1 << bit), index))
        flipped = sum(int((changed >> i & 1).sum()) for i in range(32))
        assert abs(flipped / bits - 0.5) < 5 * 0.5 / math.sqrt(bits), bit


def test_counter_avalanche() -> None:
    index = torch.arange(2048)
    base = torch.stack(philox_4x32(7, index))
    bits = base.numel() * 32
    for bit in range(11, 62, 5):
        changed = base ^ torch.stack(philox_4x32(7, index ^ (1 << bit)))
        flipped = sum(int((changed >> i & 1).sum()) for i in range(32))
        assert abs(flipped / bits - 0.5) < 5 * 0.5 / math.sqrt(bits), bit


@pytest.mark.parametrize("isa", native_isas())
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (17, 65), (64, 256)], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 0xFEDCBA9876543210])
def test_native_mask_is_the_reference_bit_for_bit(
    isa: str, shape: tuple[int, int], p: float, seed: int
) -> None:
    got = torch.full(shape, 9, dtype=torch.uint8)
    cpu.native().keep_mask(isa, seed, dropout_threshold(p), *shape, got.data_ptr())
    assert torch.equal(got, keep_mask(seed, *shape, p).to(torch.uint8))


def test_one_mask_in_forward_dx_and_da(path: Path) -> None:
    """With W = 0, A = 1 and unit B the mask can be read off s, dx and da."""
    M, K, p = 12, 100, 0.5
    x = torch.rand(M, K).add_(1).requires_grad_()
    weight, a, b = torch.zeros(4, K), torch.ones(1, K, requires_grad=True), torch.ones(4, 1)
    keep = keep_mask(21, M, K, p)
    y = lora_linear(x, weight, a, b, 1.0, dropout_p=p, seed=21, backend=path.backend)
    torch.testing.assert_close(y[:, 0], (x * keep * 2).sum(1))
    dy = torch.zeros(M, 4)
    dy[:, 0] = 1.0
    y.backward(dy)
    assert torch.equal(x.grad != 0, keep)
    torch.testing.assert_close(a.grad[0], (x.detach() * keep * 2).sum(0))


def test_nothing_is_dropped_on_the_base_branch(path: Path) -> None:
    x, weight = torch.randn(9, 40), torch.randn(24, 40)
    a, b = torch.randn(4, 40), torch.zeros(24, 4)
    y = lora_linear(x, weight, a, b, 2.0, dropout_p=0.5, backend=path.backend)
    torch.testing.assert_close(y, x @ weight.T)


def test_everything_dropped(path: Path) -> None:
    case = make_case(9, 40, 24, 4, dropout_p=1.0)
    y = lora_linear(
        case.x, case.weight, case.lora_A, case.lora_B, 2.0, dropout_p=1.0, backend=path.backend
    )
    torch.testing.assert_close(y, case.x @ case.weight.T)


def test_expectation_is_the_layer_without_dropout(main_path: Path) -> None:
    case = make_case(2, 64, 16, 4, torch.float32)
    args = (case.weight, case.lora_A, case.lora_B, case.scaling)
    runs = [
        lora_linear(case.x, *args, dropout_p=0.3, seed=seed, backend=main_path.backend)
        for seed in range(2000)
    ]
    stacked = torch.stack(runs)
    standard_error = stacked.std(0) / math.sqrt(len(runs))
    deviation = (stacked.mean(0) - lora_linear(case.x, *args)) / standard_error
    assert deviation.abs().max().item() < 5


def test_all_kernels_draw_the_same_mask(path: Path) -> None:
    """With or without a seed that the caller gave; the library has the same bits for the former."""
    case = make_case(9, 40, 24, 4, dropout_p=0.5)
    args = (case.x, case.weight, case.lora_A, case.lora_B, case.scaling, case.bias, 0.5, True)
    torch.manual_seed(5)
    seed = int(functional.draw_seed(torch.device("cpu")).item())
    expected = lora_linear(*args, seed=seed, backend="torch")
    torch.testing.assert_close(lora_linear(*args, seed=seed, backend=path.backend), expected)
    if path.backend != "torch":
        torch.manual_seed(5)
        torch.testing.assert_close(lora_linear(*args, backend=path.backend), expected)


def test_the_library_regenerates_no_mask_that_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With torch's operations that takes longer than the layer does: 5 times, for a small one."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the mask was regenerated")

    monkeypatch.setattr(Mask, "keep", refuse)
    layer = FusedLoRALinear(40, 24, r=4, lora_dropout=0.5, backend="torch")
    layer(torch.randn(9, 40, requires_grad=True)).sum().backward()
    case = make_case(9, 40, 24, 4, dropout_p=0.5)
    with pytest.raises(AssertionError, match="the mask was regenerated"):
        lora_linear(
            case.x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5, seed=3,
            backend="torch",
        )  # fmt: skip


@pytest.mark.parametrize("seed", [5, (1 << 63) + 5, (1 << 64) - 1])
def test_all_64_bits_of_a_seed_reach_the_kernels(path: Path, seed: int) -> None:
    case = make_case(9, 40, 24, 4, dropout_p=0.5)
    case.seed = seed
    check_case(case, path.backend)


def test_manual_seed_reproduces_and_calls_differ(main_path: Path) -> None:
    layer = FusedLoRALinear(40, 24, r=4, lora_dropout=0.5, backend=main_path.backend)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 40)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_eval_draws_no_random_number() -> None:
    layer = FusedLoRALinear(40, 24, r=4, lora_dropout=0.5).eval()
    before = torch.get_rng_state()
    layer(torch.randn(3, 40, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(main_path: Path, use_reentrant: bool) -> None:
    layer = FusedLoRALinear(40, 24, r=4, lora_dropout=0.5, backend=main_path.backend)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 40, requires_grad=True)

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        torch.rand(5)  # moves the generator on between forward and backward
        return list(torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B]))

    if use_reentrant:  # autograd.grad does not work through it: use .grad

        def gradients(checkpointed: bool) -> list[torch.Tensor]:
            torch.manual_seed(3)
            layer.zero_grad()
            x.grad = None
            y = checkpoint(layer, x, use_reentrant=True) if checkpointed else layer(x)
            torch.rand(5)
            y.square().sum().backward()
            return [x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]

    for plain, replayed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, replayed)


def test_retain_graph_replays_the_mask(main_path: Path) -> None:
    layer = FusedLoRALinear(40, 24, r=4, lora_dropout=0.5, backend=main_path.backend)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 40, requires_grad=True)
    y = layer(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
