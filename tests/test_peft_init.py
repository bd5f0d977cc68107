"""Adapters that PEFT initialises from the weights or from data are plain LoRA afterwards: fused."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

from lora_fused.integrations.peft import accelerate, explain
from tests.peft_models import (
    LLAMA_LAYERS,
    adapted,
    assert_equal_to_stock,
    config_for,
    llama,
    outputs_of,
    tokens,
)


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "pissa_niter_4", "olora",
                                  "orthogonal"], ids=str)  # fmt: skip
def test_from_the_weights(init: Any) -> None:
    assert_equal_to_stock(adapted(llama(), init_lora_weights=init), fused_calls=LLAMA_LAYERS)


def from_data_eva(model: nn.Module) -> nn.Module:
    config = config_for(model, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    adapted_model = peft.get_peft_model(model, config)
    ids = tokens(rows=8)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3
    peft.initialize_lora_eva_weights(adapted_model, batches, show_progress_bar=False)
    return adapted_model


def from_data_corda(model: nn.Module) -> nn.Module:
    pytest.importorskip("attr", reason="PEFT's corda imports the package attrs")
    corda = importlib.import_module("peft.tuners.lora.corda")
    settings = importlib.import_module("peft.tuners.lora.config").CordaConfig(corda_method="kpm")
    config = config_for(model, init_lora_weights="corda", corda_config=settings)
    corda.preprocess_corda(model, config, run_model=lambda: model(tokens(rows=1, length=24)))
    return peft.get_peft_model(model, config)


def from_data_lora_ga(model: nn.Module) -> nn.Module:
    loraga = importlib.import_module("peft.tuners.lora.loraga")
    settings = importlib.import_module("peft.tuners.lora.config").LoraGAConfig()
    config = config_for(model, init_lora_weights="lora_ga", lora_ga_config=settings)

    def train_step() -> None:
        model(tokens(rows=8), labels=tokens(rows=8)).loss.backward()

    loraga.preprocess_loraga(model, config, train_step)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("prepare", [from_data_eva, from_data_corda, from_data_lora_ga])
def test_from_data(prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = prepare(llama())
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)


def test_accelerated_before_the_data_is_seen() -> None:
    """EVA hooks the layers of an accelerated model as it does those of stock PEFT."""
    torch.manual_seed(0)
    stock = from_data_eva(base := llama())
    torch.manual_seed(0)
    model = peft.get_peft_model(
        copy.deepcopy(base_without_adapters(base)),
        config_for(base, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)),
    )
    accelerate(model, verbose=False)
    ids = tokens(rows=8)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(p, stock.get_parameter(name), rtol=1e-3, atol=1e-3)
    outputs_of(model)
    assert explain(model).fused_calls >= LLAMA_LAYERS


def base_without_adapters(model: nn.Module) -> nn.Module:
    plain = llama()
    state = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()
             if "lora_" not in n}  # fmt: skip
    plain.load_state_dict(state)
    return plain
