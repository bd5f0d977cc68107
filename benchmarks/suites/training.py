"""Whole networks as contenders: frozen, fully fine-tuned, with PEFT, and with PEFT accelerated.

A step is forward, backward to the network's input and, where something is trained, AdamW. Networks
have the configurations of real models and random weights; adapters sit on every linear layer of a
block, lora_B is not zero.

The rule: outputs and gradients of y, of the input and of every adapter against stock PEFT in
float64, by lora_fused.testing.assert_close_together, with stock PEFT in the item's dtype as the
baseline. Adapters hold values that the dtype has, so that fp32 adapters have the same truth. What
contains nothing of ours and no adapter (frozen, full) is the stock network and taken as it is.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.memory import allocated_bytes, allocated_on_gpu
from benchmarks.numerics import Verdict
from benchmarks.providers import FROZEN, OURS, PEFT
from benchmarks.record import OK, WRONG
from benchmarks.shapes import FORWARD
from benchmarks.suites.item import Item, Makers, Memory, Ready
from benchmarks.tensors import TORCH_DTYPES
from lora_fused.testing import assert_close_together

STEP = "step"
FULL = "full"
RANK = 16
_TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


@dataclass(frozen=True)
class Network:
    """family: llama or gpt2. head: with the language-model head, else the blocks alone."""

    name: str
    family: str
    width: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    head: bool

    def build(self, dtype: torch.dtype) -> nn.Module:
        """On the CPU, without dropout; the same weights every time."""
        transformers: Any = importlib.import_module("transformers")
        torch.manual_seed(0)
        shared = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": self.vocabulary}
        if self.family == "gpt2":
            config = transformers.GPT2Config(
                n_embd=self.width, n_inner=self.hidden, n_head=self.heads, n_layer=self.layers,
                n_positions=8192, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
            )  # fmt: skip
            kind = transformers.GPT2LMHeadModel if self.head else transformers.GPT2Model
        else:
            config = transformers.LlamaConfig(
                hidden_size=self.width, intermediate_size=self.hidden,
                num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
                num_hidden_layers=self.layers, max_position_embeddings=8192,
                tie_word_embeddings=True, **shared,
            )  # fmt: skip
            kind = transformers.LlamaForCausalLM if self.head else transformers.LlamaModel
        model: nn.Module = kind(config).to(dtype).train()
        return model

    def adapted(self, base: nn.Module, device: str, adapters: torch.dtype) -> nn.Module:
        """A copy of `base` under stock PEFT, the same every time. adapters: their dtype."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=_TARGETS[self.family],
            init_lora_weights=False, fan_in_fan_out=self.family == "gpt2",
        )  # fmt: skip
        torch.manual_seed(1)
        own: Any = copy.deepcopy(base)
        dtype = own.dtype
        model = get_peft_model(own, config, autocast_adapter_dtype=adapters != dtype)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype).to(adapters)
        return model.to(device)


class Data(NamedTuple):
    """x [1, M, width], what the blocks get; dy [1, M, width], what their output's gradient is.

    A loss such as the mean of squares would not do for that: behind a normalisation it hardly
    depends on x, and its gradient is but rounding.
    """

    x: Tensor
    dy: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        return Data(self.x.to(dtype), self.dy.to(dtype))


def item_of(network: Network, dtype: str, M: int, device: str) -> Item:
    return Item(
        name=network.name,
        shape={"M": M, "width": network.width, "layers": network.layers, "R": RANK},
        dtype=dtype,
        passes=(FORWARD, STEP),
        base=FROZEN,
        contenders=partial(makers_of, network, TORCH_DTYPES[dtype], M, device),
    )


def makers_of(network: Network, dtype: torch.dtype, M: int, device: str) -> Makers:
    """fp32 adapters over a base of lower precision (PEFT's default) and adapters in its dtype."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(1, M, network.width, generator=generator).to(device) for _ in range(2))
    data = Data(x, dy).to(dtype)
    base = network.build(dtype)
    stock = partial(network.adapted, base, device)
    references = functools.cache(partial(_references, partial(stock, dtype), data))
    plain = {
        FROZEN: partial(_stock, base, False, data),
        FULL: partial(_stock, base, True, data),
    }
    makers: dict[str, Callable[[], Ready]] = dict(plain)
    for suffix, adapters in (("", dtype), ("-fp32", torch.float32)):
        if suffix and adapters == dtype:
            continue
        for name, fused in ((PEFT, False), (OURS, True)):
            makers[name + suffix] = partial(
                _adapted, partial(stock, adapters), fused, data, references
            )
    return makers


def _stock(base: nn.Module, trained: bool, data: Data) -> Ready:
    model = copy.deepcopy(base).to(data.x.device).requires_grad_(trained)
    return _ready(model, data, lambda: Verdict(OK, "unchecked: the stock network itself"))


def _adapted(
    build: Callable[[], nn.Module],
    fused: bool,
    data: Data,
    references: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> Ready:
    model = build()
    if fused:
        from lora_fused.integrations.peft import accelerate

        report = accelerate(model, verbose=False)
        if report.not_fused:
            raise RuntimeError(f"accelerate left layers to PEFT: {report.not_fused}")

    def check() -> Verdict:
        truth, baseline = references()
        try:
            ratio = assert_close_together([outputs_of(model, data)], [truth], [baseline])
        except AssertionError as error:
            return Verdict(WRONG, str(error))
        return Verdict(OK, error_ratios={"all": ratio})

    return _ready(model, data, check)


def _ready(model: nn.Module, data: Data, check: Callable[[], Verdict]) -> Ready:
    x, dy = data.x.detach().requires_grad_(), data.dy
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def forward() -> None:
        with torch.no_grad():
            _loss_and_y(model, x, dy)

    def step() -> None:
        x.grad = None
        _loss_and_y(model, x, dy)[0].backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def memory() -> Memory:
        step()  # AdamW's moments are there from now on
        measure = allocated_on_gpu if x.is_cuda else allocated_bytes
        return Memory(measure(step)[0])

    return Ready(calls={FORWARD: forward, STEP: step}, check=check, memory=memory)


def _references(
    build: Callable[[], nn.Module], data: Data
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stock PEFT in float64, and in the dtype of the data."""
    model = build()
    baseline = outputs_of(model, data)
    return outputs_of(copy.deepcopy(model).double(), data.to(torch.float64)), baseline


def outputs_of(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """y (last hidden states or logits), dx, and the gradient of every trained parameter."""
    model.zero_grad()
    x = data.x.detach().requires_grad_()
    loss, y = _loss_and_y(model, x, data.dy)
    loss.backward()
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad, **dict(_gradients(model))}
    model.zero_grad()
    return found


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if p.grad is not None:
            yield name, p.grad


def _loss_and_y(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of made-up next tokens where there is a head, else Σ y · dy."""
    out = model(inputs_embeds=x)
    if not hasattr(out, "logits"):
        y: Tensor = out.last_hidden_state
        return (y * dy).sum(), y
    y = out.logits
    logits = y[0] if y.dtype == torch.float64 else y[0].float()
    labels = torch.arange(logits.shape[0], device=y.device) * 7919 % logits.shape[1]
    return nn.functional.cross_entropy(logits, labels), y
