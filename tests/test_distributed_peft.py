"""Accelerated PEFT layers under tensor parallelism, DDP and FSDP2, against one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.processes import World

pytest.importorskip("peft")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_fused.distributed import ColwiseLoRA, RowwiseLoRA
from lora_fused.integrations.peft import FusedLinear, accelerate, explain, restore
from tests.peft_models import LLAMA_LAYERS, adapted, gpt2, llama, tokens


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    logits = model(**inputs).logits
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(3, *logits.shape[1:], generator=generator)
    if logits.shape[0] < 3:
        dy = dy.tensor_split(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()
    (logits * dy).sum().backward()
    found = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    return {name: full(p.grad).clone() for name, p in found.items() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) >= 2 * 8
    for name, tensor in got.items():
        scale = expected[name].abs().max()
        assert (tensor - expected[name]).abs().max() <= 1e-4 * scale, name


def split_mlps(conv1d: bool) -> None:
    """Every MLP split, accelerated before or after."""
    model = adapted(gpt2() if conv1d else llama())
    expected = gradients(copy.deepcopy(model), input_ids=tokens())
    names = {"c_fc": ColwiseLoRA, "c_proj": RowwiseLoRA}
    if not conv1d:
        names = {"gate_proj": ColwiseLoRA, "up_proj": ColwiseLoRA, "down_proj": RowwiseLoRA}
    plan = {f"{'h' if conv1d else 'layers'}.*.mlp.{name}": style() for name, style in names.items()}
    mesh = init_device_mesh("cpu", (2,))
    for accelerate_first in (True, False):
        parallel = copy.deepcopy(model)
        if accelerate_first:
            accelerate(parallel, verbose=False)
        body = getattr(parallel.base_model.model, "transformer" if conv1d else "model")
        parallelize_module(body, mesh, plan)
        accelerate(parallel, verbose=False)
        split = [n for n, p in parallel.named_parameters() if isinstance(p, DTensor)]
        assert len(split) == (2 * 2 * (2 + 2) if conv1d else 2 * 3 * 3)
        assert_same(gradients(parallel, input_ids=tokens()), expected)
        report = explain(parallel)
        assert not report.stock_calls, str(report)
        assert report.fused_calls == (8 if conv1d else LLAMA_LAYERS), str(report)


@pytest.mark.parametrize("conv1d", [False, True])
def test_split_mlps(world: World, conv1d: bool) -> None:
    world.run(split_mlps, conv1d)


def data_parallel(wrapper: str) -> None:
    model = adapted(llama())
    expected = gradients(copy.deepcopy(model), input_ids=tokens())
    accelerate(model, group="always", verbose=False)
    gradients(model, input_ids=tokens())  # the first pass teaches which layers form groups
    model.zero_grad()
    wrapped: nn.Module = model
    if wrapper == "fsdp2, then accelerate":
        restore(model)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        kind = FusedLinear if wrapper.endswith("on its own") else LlamaDecoderLayer
        for module in [m for m in model.modules() if isinstance(m, kind)]:
            fully_shard(module)
        fully_shard(model)
    if wrapper == "fsdp2, then accelerate":
        assert len(accelerate(model, verbose=False).fused) == LLAMA_LAYERS
    rows = tokens().tensor_split(2)[dist.get_rank()]
    assert_same(gradients(wrapped, input_ids=rows), expected)
    report = explain(model)
    calls = 1 if wrapper == "fsdp2, then accelerate" else 2
    assert report.fused_calls == calls * LLAMA_LAYERS and not report.stock_calls, str(report)


WRAPPERS = ["ddp", "fsdp2", "fsdp2, every layer on its own", "fsdp2, then accelerate"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_data_parallel(world: World, wrapper: str) -> None:
    world.run(data_parallel, wrapper)


def torch_mask() -> None:
    """match_torch_rng draws no DTensor masks: PEFT's forward runs, and says why."""
    model = adapted(llama(), lora_dropout=0.5)
    accelerate(model, match_torch_rng=True, verbose=False)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    parallelize_module(layer, init_device_mesh("cpu", (2,)), ColwiseLoRA())
    with pytest.warns(UserWarning, match="match_torch_rng does not work on DTensors"):
        layer(torch.randn(3, layer.in_features))


def test_torch_masks_are_not_drawn_for_dtensors(world: World) -> None:
    world.run(torch_mask)


def two_masks() -> None:
    """Nor two masks for one layer."""
    model = adapted(llama(), lora_dropout=0.5)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    accelerate(model, verbose=False)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    parallelize_module(layer, init_device_mesh("cpu", (2,)), ColwiseLoRA())
    with pytest.warns(UserWarning, match="several adapters with dropout: on a DTensor only one"):
        layer(torch.randn(3, layer.in_features))


def test_several_masks_are_not_drawn_for_dtensors(world: World) -> None:
    world.run(two_masks)


def sharded_first() -> None:
    model = adapted(llama())
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    other = model.base_model.model.model.layers[1].mlp.down_proj
    fully_shard(layer)
    report = accelerate(model, verbose=False)
    why = "fully_shard has been called on it: call accelerate before"
    assert list(report.not_fused.values()) == [why]
    model(tokens())
    fully_shard(other)
    with pytest.raises(RuntimeError, match=r"a FSDPFusedLinear, .* restore before fully_shard"):
        restore(other)


def test_layers_that_were_sharded_first_are_named(world: World) -> None:
    world.run(sharded_first)
