"""The Trainer of transformers: fine-tuning on lora_fused gives the loss curve of stock PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from lora_fused.integrations.peft import accelerate, explain
from lora_fused.testing import assert_close_to_ref
from tests.peft_models import LLAMA_LAYERS, adapted, llama

STEPS = 8


class KeepsLosses(Trainer):
    """The Trainer logs losses rounded to four digits; this keeps them as they are."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def data() -> list[dict[str, Tensor]]:
    """Few different tokens, so that there is something to learn in a few steps."""
    rows = torch.randint(0, 4, (64, 12), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(model: nn.Module, folder: Path, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of STEPS steps, and the adapters after them."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, seed=3,
        learning_rate=2e-2, report_to="none", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", save_strategy="no", **options,
    )  # fmt: skip
    trainer = KeepsLosses(model, arguments, train_dataset=data())
    trainer.train()
    adapters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return torch.tensor(trainer.losses, dtype=torch.float64), adapters


@pytest.mark.parametrize(
    ("dropout", "options"),
    [
        (0.0, {}),
        (0.3, {}),
        (0.0, {"gradient_accumulation_steps": 2}),
        (0.3, {"gradient_checkpointing": True}),
    ],
    ids=["plain", "dropout", "accumulation", "checkpointing and dropout"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_curve(dropout: float, options: dict[str, Any], tmp_path: Path) -> None:
    stock = adapted(llama(), lora_dropout=dropout)
    fused = copy.deepcopy(stock)
    accelerate(fused, match_torch_rng=dropout > 0, verbose=False)
    expected, adapters = trained(stock, tmp_path, **options)
    got, fused_adapters = trained(fused, tmp_path, **options)
    report = explain(fused)
    assert report.fused_calls >= STEPS * LLAMA_LAYERS and not report.stock_calls, str(report)
    assert expected.min() < 0.97 * expected[0], "stock PEFT did not learn: nothing is compared"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    moved = max((adapters[n] - p).abs().max() for n, p in fused_adapters.items())
    assert moved < 1e-2  # 8 steps of 2e-2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loss_curve_in_bf16(tmp_path: Path) -> None:
    """Under autocast: as close to the fp32 curve as stock PEFT under autocast is."""
    model = adapted(llama())
    truth, _ = trained(copy.deepcopy(model), tmp_path)
    stock, _ = trained(copy.deepcopy(model), tmp_path, bf16=True)
    accelerate(model, verbose=False)
    got, _ = trained(model, tmp_path, bf16=True)
    assert explain(model).fused_calls == STEPS * LLAMA_LAYERS
    assert not torch.equal(stock, truth)
    assert_close_to_ref("losses", got, truth, stock.float())


def test_a_wrong_scale_would_be_noticed(tmp_path: Path) -> None:
    """The comparison above bites: one layer's scale is off by 1 %."""
    stock = adapted(llama())
    other = copy.deepcopy(stock)
    layer = other.base_model.model.model.layers[0].mlp.down_proj
    layer.scaling["default"] *= 1.01
    expected, _ = trained(stock, tmp_path)
    got, _ = trained(other, tmp_path)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
