"""LoRA fine-tuning of a causal model with PEFT and the Trainer of transformers, on lora_fused.

    python -m examples.finetune_causal

The model is a Llama of six million parameters built here, on bytes, with random weights; the text
is source code of Python's standard library. Adapters on every linear layer; embeddings and output
layer are trained whole. Nothing is downloaded. A few minutes on two cores.

The learning rate is one at which the loss curves can be compared. Over 120 steps (fp32, one
thread), the largest difference of two losses at the same step, relative to the first loss:

    learning rate                              1e-3     2e-3     5e-3
    stock PEFT and lora_fused                  9e-8     2e-7     2e-2
    stock PEFT, one adapter value 1 ulp off    9e-8     2e-7     2e-2

At 5e-3 training is chaotic: rounding of the last place grows to the size of the noise of a batch.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import allocated_bytes
from examples.side_by_side import (
    Pace,
    accelerate_if,
    arguments,
    compare,
    need,
    quiet_and_offline,
    report_if,
)
from examples.stdlib_text import MODULES, sources

BATCH, LENGTH, LEARNING_RATE = 8, 128, 2e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(args: argparse.Namespace) -> Any:
    """A small Llama on bytes, with LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = 64 if args.quick else 320
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip
    config = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank,
        lora_dropout=args.lora_dropout, target_modules=TARGETS,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    return get_peft_model(base, config)


def dataset(text: bytes, blocks: int) -> list[dict[str, Tensor]]:
    """Blocks of bytes."""
    tokens = torch.frombuffer(bytearray(text[: blocks * LENGTH]), dtype=torch.uint8).long()
    rows = tokens[: tokens.numel() // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(ours: bool, args: argparse.Namespace, pace: Pace) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class KeepsLoss(Trainer):
        """The Trainer logs losses rounded to four digits; this keeps the last one as it is."""

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.last_loss: Tensor = super().training_step(*args, **kwargs)
            return self.last_loss

    class InTurn(TrainerCallback):
        """Makes a step when told to, and reports it."""

        def on_step_begin(self, *call: Any, **kwargs: Any) -> None:
            pace.begin()

        def on_step_end(self, *call: Any, **kwargs: Any) -> None:
            pace.end(float(trainer.last_loss))

    model = build(args)
    accelerate_if(ours, model, args.lora_dropout)
    data = dataset(args.text, blocks=BATCH * (args.steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, seed=1, log_level="error",
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = KeepsLoss(model, options, train_dataset=data, callbacks=[InTurn()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    peak, _ = allocated_bytes(lambda: model(**batch).loss.backward())
    pace.finish(peak, {"loss of a uniform guess": math.log(256)}, report_if(ours, model))


def main() -> None:
    for package in ("peft", "transformers", "accelerate"):
        need(package)
    quiet_and_offline()
    args = arguments(__doc__, steps=150, quick_steps=4, out="causal")
    args.text = "".join(text for module in MODULES for text in sources(module)).encode()
    compare(train, args, "a small Llama on Python source code")


if __name__ == "__main__":
    main()
