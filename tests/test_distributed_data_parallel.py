"""DDP and FSDP2 on gloo processes: gradients of the whole batch, state dicts, mixed precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_fused import FusedLoRALinear
from lora_fused.distributed import ColwiseLoRA, RowwiseLoRA
from tests.processes import World

WIDTH, HIDDEN, RANK, BATCH = 12, 20, 3, 8
FULL = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    """Two LoRA layers with frozen weights and trainable biases."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.up = FusedLoRALinear(WIDTH, HIDDEN, r=RANK, **options)
        self.down = FusedLoRALinear(HIDDEN, WIDTH, r=RANK, **options)
        nn.init.normal_(self.up.lora_B, std=0.1)
        nn.init.normal_(self.down.lora_B, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Recomputed(Block):
    """Block under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


def model_of(block: type[Block] = Block, **options: Any) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(block(**options), block(**options))


def batch() -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))


def mine(x: Tensor) -> Tensor:
    """This rank's rows."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def adapters(model: nn.Module) -> set[nn.Parameter]:
    return {p for name, p in model.named_parameters() if "lora_" in name}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every trainable parameter, by its name in the bare model."""
    model(x).square().mean().backward()
    return {
        name.removeprefix("module."): full(p.grad).clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def losses(model: nn.Module, x: Tensor, parameters: Iterable[nn.Parameter]) -> list[float]:
    """Of five steps of AdamW, each the mean over all ranks."""
    optimizer, values = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        values.append(mean.item() / dist.get_world_size())
    return values


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == expected.keys() and len(got) == 12
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def replicated_adapters(model: nn.Module, **options: Any) -> nn.Module:
    """Base parameters in FSDP2, adapters in DDP."""
    ignored = adapters(model)
    rest = [name for name, p in model.named_parameters() if p not in ignored]
    sharded(model, ignored_params=ignored, **options)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, rest)
    return DistributedDataParallel(model)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
    "fsdp2, adapters replicated": replicated_adapters,
}


def whole_batch(wrapper: str, block: type[Block]) -> None:
    model, x = model_of(block), batch()
    expected = gradients(copy.deepcopy(model), x)
    wrapped = WRAPPERS[wrapper](copy.deepcopy(model))
    assert_same(gradients(wrapped, mine(x)), expected, **CLOSE)


@pytest.mark.parametrize("block", [Block, Recomputed])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_those_of_the_whole_batch(
    world: World, wrapper: str, block: type[Block]
) -> None:
    world.run(whole_batch, wrapper, block)


def training(wrapper: str) -> None:
    single, x = model_of(), batch()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(single))
    trainable = [p for p in single.parameters() if p.requires_grad]
    expected = losses(single, x, trainable)
    got = losses(wrapped, mine(x), [p for p in wrapped.parameters() if p.requires_grad])
    assert expected[-1] < 0.9 * expected[0]
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-4 * expected[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_gives_the_same_losses(world: World, wrapper: str) -> None:
    world.run(training, wrapper)


def compiled_blocks(wrapper: str) -> None:
    model, x = model_of(), batch()
    expected = gradients(copy.deepcopy(model), x)
    for layer in model:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(gradients(WRAPPERS[wrapper](model), mine(x)), expected, **CLOSE)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_compiled_blocks(world: World, wrapper: str) -> None:
    world.run(compiled_blocks, wrapper)


def four_processes() -> None:
    """FSDP2 over two, tensor parallel over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, x = model_of(), batch()
    expected = gradients(copy.deepcopy(model), x)
    for block in model:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseLoRA(), "down": RowwiseLoRA()})
    sharded(model, mesh=mesh["data"])
    rows = x.chunk(2)[mesh.get_local_rank("data")]
    assert_same(gradients(model, rows), expected, **CLOSE)


def test_fsdp2_with_tensor_parallel(world4: World) -> None:
    world4.run(four_processes)


def mixed_precision() -> None:
    """Parameters gathered in bf16, gradients reduced in fp32: as one process in bf16."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    model, x = model_of(), batch()
    expected = gradients(copy.deepcopy(model), x)
    stock = sharded(copy.deepcopy(model), mp_policy=policy)
    seen: list[torch.dtype] = []
    stock[0].up.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    got = gradients(stock, mine(x))
    assert seen == [torch.bfloat16]
    single = model_of().to(torch.bfloat16)
    low = gradients(single, x.to(torch.bfloat16))
    for name, truth in expected.items():
        assert got[name].dtype == torch.float32
        allowed = (low[name].float() - truth).abs().max()
        floor = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (got[name] - truth).abs().max() <= 2 * allowed + floor, name


def test_mixed_precision(world: World) -> None:
    world.run(mixed_precision)


def state_dicts(wrapper: str) -> None:
    model = model_of()
    reference = {name: t.clone() for name, t in model.state_dict().items()}
    wrapped = WRAPPERS[wrapper](model)
    saved = get_model_state_dict(wrapped, options=FULL)
    assert saved.keys() == (reference.keys() if dist.get_rank() == 0 or saved else set())
    for name, t in saved.items():
        assert torch.equal(t, reference[name]), name
    other = {name: t + 1 for name, t in reference.items()}
    set_model_state_dict(wrapped, dict(other), options=FULL)
    whole = model_of()
    whole.load_state_dict(other)
    torch.testing.assert_close(wrapped(batch()), whole(batch()), **CLOSE)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_dict_is_that_of_the_bare_model(world: World, wrapper: str) -> None:
    world.run(state_dicts, wrapper)


def memory(wrapper: str) -> None:
    """What each rank keeps of the parameters between steps."""
    model = model_of()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    wrapped = WRAPPERS[wrapper](model)
    assert isinstance(wrapped, FSDPModule) or wrapper != "fsdp2"
    replicated = wrapper == "fsdp2, adapters replicated"
    for name, p in model.named_parameters():
        kept = p.to_local().numel() if isinstance(p, DTensor) else p.numel()
        whole = replicated and "lora_" in name
        assert kept <= (sizes[name] if whole else math.ceil(sizes[name] * 0.7)), name


@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp2, adapters replicated"])
def test_each_rank_keeps_its_part(world: World, wrapper: str) -> None:
    world.run(memory, wrapper)


def dropout(wrapper: str) -> float:
    """Forward and backward use one mask, another on each rank: with weight 0, adapters 1."""
    torch.manual_seed(100 + dist.get_rank())
    layer = FusedLoRALinear(64, 32, r=2, lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    wrapped = WRAPPERS[wrapper](nn.Sequential(layer))
    x = (torch.rand(32, 64) + 1).requires_grad_()
    y = wrapped(x)
    y.sum().backward()
    kept = x.grad != 0
    s = 2 * (x * kept).sum(1, keepdim=True)
    torch.testing.assert_close(y, (2 * layer.scaling * s).expand_as(y), rtol=1e-4, atol=1e-3)
    both = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(both, kept)
    return (both[0] & both[1]).double().mean().item()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_dropout_is_independent_on_each_rank(world: World, wrapper: str) -> None:
    for overlap in world.run(dropout, wrapper):
        assert abs(overlap - 0.25) < 0.045
