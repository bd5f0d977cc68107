"""ColwiseLoRA and RowwiseLoRA: a split MLP against the whole one, dropout, state dicts, merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from lora_fused import FusedLoRALinear, explain
from lora_fused.distributed import ColwiseLoRA, RowwiseLoRA
from lora_fused.reference import keep_mask
from tests.processes import World

WIDTH, HIDDEN, RANK = 12, 20, 3


class MLP(nn.Module):
    """A column layer, an activation on its slice, a row layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = FusedLoRALinear(WIDTH, HIDDEN, r=RANK, **options)
        self.down = FusedLoRALinear(HIDDEN, WIDTH, r=RANK, **options)
        nn.init.normal_(self.up.lora_B)
        nn.init.normal_(self.down.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


def split(model: nn.Module, **styles: Any) -> nn.Module:
    plan = {"up": styles.get("up", ColwiseLoRA()), "down": styles.get("down", RowwiseLoRA())}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def step(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """y, dx and the gradient of every trainable parameter."""
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = [full(p.grad) for p in model.parameters() if p.requires_grad]
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients]


def inputs(*leading: int) -> Tensor:
    return torch.randn(*leading, WIDTH, generator=torch.Generator().manual_seed(1))


def split_equals_whole(compiled: bool = False, **options: Any) -> None:
    model = MLP(**options)
    expected = step(model, inputs(2, 4))
    model.zero_grad()
    parallel = split(model)
    assert parallel.up.weight.to_local().numel() == WIDTH * HIDDEN // 2
    assert parallel.down.lora_A.to_local().shape == (RANK, HIDDEN // 2)
    run = torch.compile(parallel, backend="aot_eager", fullgraph=True) if compiled else parallel
    for got, want in zip(step(parallel, inputs(2, 4), run), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_mlp(world: World, fan_in_fan_out: bool) -> None:
    world.run(partial(split_equals_whole, fan_in_fan_out=fan_in_fan_out))


def test_compiled_mlp(world: World) -> None:
    world.run(partial(split_equals_whole, compiled=True))


def sequence_parallel() -> None:
    model, x = MLP(), inputs(2, 4)
    expected = step(model, x)
    model.zero_grad()
    rank = dist.get_rank()
    split(model, up=ColwiseLoRA(input_layouts=Shard(1)), down=RowwiseLoRA(output_layouts=Shard(1)))
    mine = slice(2 * rank, 2 * rank + 2)
    part = x[:, mine].clone().requires_grad_()
    y = model(part)
    dy = torch.linspace(-1, 1, x.numel()).view_as(x)[:, mine]
    (y * dy).sum().backward()
    torch.testing.assert_close(y, expected[0][:, mine], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.grad, expected[1][:, mine], rtol=1e-5, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p, want in zip(parameters, expected[2:], strict=True):
        torch.testing.assert_close(full(p.grad), want, rtol=1e-5, atol=1e-5)


def test_sequence_parallel(world: World) -> None:
    world.run(sequence_parallel)


def mask_of(layer: FusedLoRALinear, x: Tensor) -> Tensor:
    """The elements of x [M, in] that the layer keeps: dx's pattern, with weight 0, adapters 1."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y = full(y)
    y.backward(torch.ones_like(y))
    kept = leaf.grad != 0
    s = (x * kept).sum(1, keepdim=True) if x.shape[1] == layer.in_features else None
    if s is not None:
        expected = (layer.r * layer.scaling / (1 - layer.lora_dropout) * s).expand_as(y)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    return kept


def column_masks() -> Tensor:
    layer = FusedLoRALinear(64, 32, r=2, lora_dropout=0.5, bias=False)
    up = parallelize_module(
        layer, init_device_mesh("cpu", (2,)), ColwiseLoRA(output_layouts=Replicate())
    )
    torch.manual_seed(11)
    return mask_of(up, torch.rand(16, 64, generator=torch.Generator().manual_seed(2)) + 1)


def test_dropout_of_a_replicated_input_is_one_mask(world: World) -> None:
    first, second = world.run(column_masks)
    torch.manual_seed(11)
    seed = torch.randint(0x7FFFFFFFFFFFFFFF, (), dtype=torch.int64)
    assert torch.equal(first, second)
    assert torch.equal(first, keep_mask(seed, 16, 64, 0.5))


def row_masks() -> Tensor:
    """Every rank gets its half of the columns, of the same values."""
    layer = FusedLoRALinear(64, 32, r=2, lora_dropout=0.5, bias=False)
    down = parallelize_module(layer, init_device_mesh("cpu", (2,)), RowwiseLoRA())
    torch.manual_seed(11)
    return mask_of(down, torch.rand(64, 32, generator=torch.Generator().manual_seed(2)) + 1)


def test_dropout_of_a_split_input_is_an_independent_mask_on_each_rank(world: World) -> None:
    first, second = world.run(row_masks)
    both = (first & second).double().mean().item()
    for mask in (first, second):
        assert abs(mask.double().mean().item() - 0.5) < 0.05  # 2048 draws: 4.5 sigma
    assert abs(both - 0.25) < 0.045  # equal masks give 0.5, complementary ones 0


def different_generators() -> None:
    layer = FusedLoRALinear(8, 8, r=2, lora_dropout=0.5)
    # A mesh of its own: the check is made once per mesh.
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    parallelize_module(layer, mesh, ColwiseLoRA())
    torch.manual_seed(dist.get_rank())
    with pytest.raises(RuntimeError, match=r"call torch\.manual_seed with one"):
        layer(torch.ones(2, 8))
    torch.manual_seed(5)
    layer(torch.ones(2, 8))


def test_different_generators_are_refused(world: World) -> None:
    world.run(different_generators)


def checkpointed() -> None:
    model, x = split(MLP(lora_dropout=0.5)), inputs(2, 4)
    torch.manual_seed(7)
    expected = step(model, x)
    model.zero_grad()
    torch.manual_seed(7)
    got = step(model, x, lambda t: checkpoint(model, t, use_reentrant=False))
    for tensor, want in zip(got, expected, strict=True):
        assert torch.equal(tensor, want)


def test_activation_checkpointing_draws_the_same_mask(world: World) -> None:
    world.run(checkpointed)


def state_dicts() -> None:
    whole = MLP()
    reference = {name: t.clone() for name, t in whole.state_dict().items()}
    parallel = split(copy.deepcopy(whole))
    options = StateDictOptions(full_state_dict=True)
    for name, t in get_model_state_dict(parallel, options=options).items():
        assert torch.equal(t, reference[name]), name
    other = {name: t + 1 for name, t in reference.items()}
    set_model_state_dict(parallel, dict(other), options=options)
    for name, t in parallel.state_dict().items():
        assert isinstance(t, DTensor) and torch.equal(t.full_tensor(), other[name]), name
    whole.load_state_dict(other)
    torch.testing.assert_close(parallel(inputs(3)), whole(inputs(3)), rtol=1e-5, atol=1e-5)


def test_state_dict_is_that_of_the_whole_model(world: World) -> None:
    world.run(state_dicts)


def merging() -> None:
    model, x = MLP(), inputs(3)
    expected = model(x)
    parallel = split(model)
    for layer in (parallel.up, parallel.down):
        layer.merge()
    torch.testing.assert_close(parallel(x), expected, rtol=1e-5, atol=1e-5)
    for layer in (parallel.up, parallel.down):
        layer.unmerge()
    torch.testing.assert_close(parallel(x), expected, rtol=1e-5, atol=1e-5)


def test_merging_a_split_layer(world: World) -> None:
    world.run(merging)


def adamw(model: nn.Module, x: Tensor) -> list[float]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def training() -> None:
    model, x = MLP(), inputs(2, 4)
    expected = adamw(copy.deepcopy(model), x)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(adamw(split(model), x), expected, rtol=1e-4, atol=1e-5)


def test_training_gives_the_same_losses(world: World) -> None:
    world.run(training)


def explained() -> list[str]:
    model = split(MLP())
    return [str(layer.problem) for layer in explain(model, torch.randn(3, WIDTH)).layers]


def test_explain_speaks_of_what_this_rank_computes(world: World) -> None:
    half = HIDDEN // 2
    up, down = world.run(explained)[0]
    assert up.startswith(f"M=3 K={WIDTH} N={half} R={RANK} ")
    assert down.startswith(f"M=3 K={half} N={WIDTH} R={RANK} ")


def compiled_dropout() -> None:
    model, x = split(MLP(lora_dropout=0.5)), inputs(2, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    expected = step(model, x)
    model.zero_grad()
    torch.manual_seed(5)
    for got, want in zip(step(model, x, compiled), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compiled_dropout(world: World) -> None:
    world.run(compiled_dropout)


def prepacked() -> None:
    """Splitting reads the weight, which ends the pack."""
    model, x = MLP(), inputs(3)
    expected = model(x)
    model.up.prepack()
    torch.testing.assert_close(split(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_prepacked_layer_can_be_split(world: World) -> None:
    world.run(prepacked)
