"""What is stored and held: checkpoints (section 4.2), gradients and optimizer states."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_fused.loralib as lora
from benchmarks.claims import models
from benchmarks.claims.claim import Claim, size

TASKS = 100
ADAM_STATES = 2  # first and second moment


def claims() -> list[Claim]:
    return [*_gpt3_checkpoints(), *_gpt2_checkpoints(), _gpt3_training_memory(), _gpt2_memory()]


def _gpt3() -> nn.Module:
    with torch.device("meta"):
        return models.add_lora(models.gpt3_175b(), r=4)


def _gpt3_checkpoints() -> list[Claim]:
    """fp16 files of GPT-3 175B, r = 4: sizes from the shapes of the state dicts, on meta."""
    model = _gpt3().half()
    adapter = _nbytes(lora.lora_state_dict(model))
    whole = _nbytes(model.state_dict()) - adapter
    how = "bytes of the fp16 state dict, on meta"
    return [
        Claim("storage", "4.2", "GPT-3 checkpoint, all weights", "350 GB", size(whole), whole, how),
        Claim(
            "storage", "4.2", "GPT-3 checkpoint, LoRA r = 4", "35 MB", size(adapter), adapter, how,
            "36.0 MiB; the paper's MB are between MB and MiB",
        ),
        Claim(
            "storage", "4.2", "smaller by", "about 10,000 times", f"{whole / adapter:,.0f} times",
            whole / adapter, how,
        ),
        Claim(
            "storage", "4.2", f"{TASKS} tasks: with LoRA / with full fine-tuning",
            "354 GB / 35 TB", f"{size(whole + TASKS * adapter)} / {size(TASKS * whole)}",
            whole + TASKS * adapter, how,
        ),
    ]  # fmt: skip


def _gpt2_checkpoints() -> list[Claim]:
    """Files really written: GPT-2 medium, r = 4, fp32."""
    model = models.add_lora(models.gpt2_medium(), r=4)
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        states = {"whole": model.state_dict(), "adapter": lora.lora_state_dict(model)}
        for name, state in states.items():
            path = Path(folder) / f"{name}.safetensors"
            save_file({key: t.contiguous() for key, t in state.items()}, path)
            written[name] = path.stat().st_size
    return [
        Claim(
            "storage", "table 3", "GPT-2 medium adapter file, r = 4", "1.5 MB (loralib's README)",
            size(written["adapter"]), written["adapter"],
            f"safetensors written here; the whole model is {size(written['whole'])}",
        )
    ]  # fmt: skip


def _gpt3_training_memory() -> Claim:
    """Weights in fp16; gradients in fp16, Adam's two states in fp16, of what is trained."""
    model = _gpt3()
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = models.trainable(model)
    full = 2 * frozen * (2 + ADAM_STATES)
    adapted = 2 * frozen + 2 * trained * (2 + ADAM_STATES)
    return Claim(
        "storage", "4.2", "GPT-3 training memory without activations, full / LoRA",
        "1.2 TB / 350 GB", f"{size(full)} / {size(adapted)}", full / adapted,
        "arithmetic: fp16 weights, gradients and two Adam states",
        "the paper does not say how it counts; states in fp32 would give 2.1 TB",
    )  # fmt: skip


def _gpt2_memory() -> Claim:
    """Bytes of gradients and optimizer states after one step of AdamW, GPT-2 medium, fp32."""
    full = _trained_bytes(models.gpt2_medium())
    adapted = _trained_bytes(models.add_lora(models.gpt2_medium(), r=4))
    return Claim(
        "storage", "4.2", "GPT-2 medium: gradients and Adam states, full / LoRA r = 4", "none",
        f"{size(full)} / {size(adapted)}", full / adapted, "tensors alive after one step, fp32",
    )  # fmt: skip


def _trained_bytes(model: nn.Module) -> int:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    tokens = torch.arange(8).view(1, 8)
    model(tokens).last_hidden_state.square().mean().backward()
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return sum(t.nbytes for t in (*states, *gradients))


def _nbytes(state: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in state.values())
