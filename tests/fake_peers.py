"""Peers as their sources offer them, in plain torch: what our adapters may call, and with what.

Test only. Signatures, layouts and what is read of PEFT's layer are those of unsloth 2026.10.9,
axolotl 0.19.0, LoRAFusion at c48d7fd and freesolo-chalk 0.5.7; bodies are the formula. `scale`
multiplies the LoRA branch: 1 is right, anything else is a peer that lies.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

scale = 1.0


def _lora(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return scale * scaling * (x @ a.t() @ b.t())


def _of_peft(projection: Any, x: Tensor, with_bias: bool) -> Tensor:
    """What unsloth and axolotl read of a PEFT layer, and the shape that their backward unpacks."""
    assert not projection.disable_adapters and not projection.merged
    (adapter,) = projection.active_adapters
    _batch, _seq_len, K = x.shape
    base = projection.base_layer
    w, a, b = base.weight, projection.lora_A[adapter].weight, projection.lora_B[adapter].weight
    assert w.shape[1] == a.shape[1] == K and b.shape == (w.shape[0], a.shape[0])
    dropped = projection.lora_dropout[adapter](x)
    y = x @ w.t() + _lora(dropped, a, b, projection.scaling[adapter])
    return y + base.bias if with_bias and base.bias is not None else y


def apply_lora_o(self: Any, X: Tensor) -> Tensor:
    """unsloth.kernels.fast_lora: the base layer's bias is ignored."""
    return _of_peft(self.o_proj, X, with_bias=False)


def apply_lora_linear(proj: Any, X: Tensor) -> Tensor:
    """axolotl.kernels.lora."""
    return _of_peft(proj, X, with_bias=True)


def fused_linear_lora(
    x: Tensor,
    linear_w: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    alpha: float,
    seed: int | None = None,
    dropout_p: float = 0.0,
    linear_bias: Tensor | None = None,
) -> Tensor:
    """lorafusion.ops.lora_v1: x of three dimensions, all of one dtype."""
    batch, seq, K = x.shape
    assert linear_w.shape[1] == K and linear_w.is_contiguous()
    assert {t.dtype for t in (linear_w, lora_a, lora_b)} == {x.dtype}
    x = x.reshape(batch * seq, K)
    dropped = torch.nn.functional.dropout(x, dropout_p)
    y = x @ linear_w.t() + _lora(dropped, lora_a, lora_b, alpha)
    return (y if linear_bias is None else y + linear_bias).reshape(batch, seq, -1)


def load_lora() -> Callable[[Tensor, Tensor, Tensor, float], Tensor] | None:
    """chalk.ops.lora: the branch alone, on an activation of two dimensions."""

    def delta(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        assert x.dim() == 2 and A.shape[1] == x.shape[1] and B.shape[1] == A.shape[0]
        return _lora(x, A, B, scaling)

    return delta


_OFFERED: dict[str, Any] = {
    "unsloth.kernels.fast_lora": apply_lora_o,
    "axolotl.kernels.lora": apply_lora_linear,
    "lorafusion.ops.lora_v1": fused_linear_lora,
    "chalk.ops.lora": load_lora,
}


def install(patch: pytest.MonkeyPatch, lies: bool = False) -> None:
    """The peers can be imported while the patch lasts."""
    patch.setattr("tests.fake_peers.scale", 0.5 if lies else 1.0)
    for path, function in _OFFERED.items():
        parent = None
        for name in itertools.accumulate(path.split("."), "{}.{}".format):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            patch.setitem(sys.modules, name, module)
            if parent is not None:
                setattr(parent, name.rpartition(".")[2], module)
            parent = module
        setattr(parent, function.__name__, function)
