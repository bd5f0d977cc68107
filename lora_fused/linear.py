"""FusedLoRALinear: nn.Linear with a LoRA adapter, computed by the fused operations."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lora_fused import packed
from lora_fused.functional import call_layer
from lora_fused.group import LoRAWeights
from lora_fused.merged import Merged, add_delta, fingerprint


class FusedLoRALinear(nn.Linear):
    """y = x Wᵀ + scaling · (dropout(x) lora_Aᵀ) lora_Bᵀ + bias, with W frozen.

    An nn.Linear with loralib's parameter names directly on the module: `weight` [out, in] ([in,
    out] with fan_in_fan_out, as GPT-2's Conv1D and loralib store it), `bias` [out], `lora_A` [r,
    in] and `lora_B` [out, r]. It loads loralib's state dicts, and those of nn.Linear with
    strict=False. lora_A starts as nn.Linear's weight does, lora_B at zero, so a new layer computes
    what its base does. As in loralib, the bias stays trainable, and r = 0 gives a plain linear
    layer with a trainable weight.

    Args:
        r, lora_alpha: scaling = lora_alpha / r, or lora_alpha / √r with use_rslora (arXiv
        2312.03732).
            `layer.scaling` is a plain float that may be changed at any time.
        lora_dropout: probability of dropping an input of the LoRA branch, in training mode.
        merge_weights: eval() merges and train() unmerges, as loralib does. Off by default.
        backend: "auto", "cpu" or "torch"; see lora_linear, also for dtypes and errors.

    Merging: `merge()` adds the adapter into a new `weight` and keeps the original Parameter aside,
    which `unmerge()` puts back, bit for bit. It costs the memory of one more weight. While merged:

    * state_dict() holds the original weight, so that a checkpoint means the same at any time;
      read `layer.weight` for the merged one;
    * load_state_dict() and to() (also half(), cuda(), …) act on the original and merge again;
    * lora_A, lora_B and scaling may change: they take effect at the next merge;
    * a copy (deepcopy, pickle) is a merged layer that can be unmerged;
    * if `weight` itself is written, unmerge() keeps the change: it subtracts the adapter from the
      written weight, which rounds, and warns.
    """

    r: int = 0
    fan_in_fan_out: bool = False
    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _merged: Merged | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if r < 0:
            raise ValueError(f"FusedLoRALinear: r is {r}, expected 0 or more.")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(
                f"FusedLoRALinear: lora_dropout is {lora_dropout}, expected a number in [0, 1]."
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, float(lora_dropout)
        self.use_rslora, self.fan_in_fan_out = use_rslora, fan_in_fan_out
        self.merge_weights, self.backend = merge_weights, backend
        self._merged = None
        self.scaling = _initial_scaling(r, lora_alpha, use_rslora)
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous())
        self._add_adapter()

    def _add_adapter(self) -> None:
        """Freeze the weight and create lora_A and lora_B beside it."""
        if self.r == 0:
            return
        self.weight.requires_grad_(False)
        empty = self.weight.new_empty
        self.lora_A = nn.Parameter(empty(self.r, self.in_features))
        self.lora_B = nn.Parameter(empty(self.out_features, self.r))
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        backend: str = "auto",
    ) -> FusedLoRALinear:
        """A LoRA layer on the very weight and bias Parameters of `linear`: nothing is copied.

        `linear` is an nn.Linear, or with fan_in_fan_out any module with a weight [in, out], such
        as the Conv1D of transformers. Its weight is frozen (for r > 0). The adapter takes its
        device and dtype.
        """
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise TypeError(
                f"from_linear: {type(linear).__name__} has no 2-D weight Parameter to share."
            )
        if not weight.dtype.is_floating_point:
            raise TypeError(
                f"from_linear: the weight has dtype {weight.dtype}, "
                "expected a floating-point dtype."
            )
        rows, cols = weight.shape
        in_features, out_features = (rows, cols) if fan_in_fan_out else (cols, rows)
        layer = cls(
            in_features, out_features, 0, lora_alpha, lora_dropout, bias=False,
            use_rslora=use_rslora, fan_in_fan_out=fan_in_fan_out, merge_weights=merge_weights,
            backend=backend, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        layer.weight = weight
        layer.register_parameter("bias", getattr(linear, "bias", None))
        layer.r, layer.scaling = r, _initial_scaling(r, lora_alpha, use_rslora)
        layer._add_adapter()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialise everything: weight and bias as nn.Linear does, the adapter as loralib does."""
        with torch.no_grad():
            weight = self.weight.t() if self.fan_in_fan_out else self.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
                nn.init.uniform_(self.bias, -bound, bound)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A: Kaiming-uniform with a = √5. lora_B: zeros."""
        if self.r > 0:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in]. Errors are those of lora_linear."""
        weight, pack = packed.read(parameter(self, "weight"))
        bias = parameter(self, "bias")
        if self.fan_in_fan_out:
            weight = weight.t()
        if self.r == 0 or self._merged is not None:
            if pack is None:
                return nn.functional.linear(x, weight, bias)
            return call_layer(x, weight, None, None, bias, 1.0, 0.0, None, self.backend, pack)
        p = self.lora_dropout if self.training else 0.0
        lora_A, lora_B = self.adapter()
        return call_layer(
            x, weight, lora_A, lora_B, bias, self.scaling, p, None, self.backend, pack
        )

    def adapter(self) -> tuple[Tensor, Tensor]:
        """lora_A [R, in] and lora_B [out, R] to compute with; subclasses may store them packed."""
        return parameter(self, "lora_A"), parameter(self, "lora_B")

    def lora_weights(self) -> LoRAWeights:
        """This layer as a member of lora_linear_group. Not for a merged layer or one with r = 0."""
        if self.r == 0 or self.merged:
            raise RuntimeError("lora_weights: the layer has no adapter apart from its weight.")
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return LoRAWeights(weight, *self.adapter(), self.scaling, self.bias, self.lora_dropout)

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the sum of base and adapter."""
        return self._merged is not None

    def merge(self) -> None:
        """Add the adapter into the weight. Nothing if it is merged already or r = 0."""
        if self.merged or self.r == 0:
            return
        base = self.weight
        a, b = (t.detach().clone() for t in self.adapter())
        total = add_delta(packed.read(base)[0].detach(), a, b, self.scaling, self.fan_in_fan_out)
        self.weight = nn.Parameter(total, requires_grad=base.requires_grad)
        self._merged = Merged(base, a, b, self.scaling, fingerprint(total))

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Nothing if it is not merged."""
        merged, self._merged = self._merged, None
        if merged is None:
            return
        current = packed.read(self.weight)[0].detach()
        if fingerprint(current) != merged.fingerprint:
            warnings.warn(
                "FusedLoRALinear: weight was written while merged; "
                "unmerge subtracts the adapter from it, which rounds.",
                stacklevel=2,
            )
            restored = add_delta(
                current, merged.delta_A, merged.delta_B, -merged.scaling, self.fan_in_fan_out
            )
            with torch.no_grad():
                merged.base.copy_(restored)
        self.weight = merged.base

    def train(self, mode: bool = True) -> FusedLoRALinear:
        """nn.Module.train; with merge_weights also unmerges (True) or merges (False)."""
        super().train(mode)
        if self.merge_weights:
            if mode:
                self.unmerge()
            else:
                self.merge()
        return self

    def prepack(self) -> FusedLoRALinear:
        """Pack the weight for the native CPU kernels, in both directions. Returns self.

        Takes three times the memory of the weight instead of one. The values become private to the
        layer: whatever reads or writes `layer.weight` (also state_dict(), to(), load_state_dict(),
        merge()'s result, an optimizer) ends the pack and works on an ordinary weight, so no output
        ever comes from a stale pack; call prepack() again to go on with one. Parameter objects
        keep their identity; tensors that shared the weight's memory before are cut off, as by
        to(device). See lora_fused.packed. Call it after moving and loading the model; under
        torch.compile a packed layer is a graph break. Whether a call reads the pack is up to the
        dispatcher (explain() tells): where a plain weight was measured faster, that is used.

        Where the native kernels cannot run it warns and leaves the layer as it is.

        Raises:
            RuntimeError: the weight is trainable.
        """
        packed.pack_parameter(self.weight, self.fan_in_fan_out)
        return self

    @property
    def prepacked(self) -> bool:
        """Whether calls use a pack right now."""
        return packed.read(self.weight)[1] is not None

    def _apply(self, fn: Any, recurse: bool = True) -> FusedLoRALinear:
        merged = self.merged
        self.unmerge()
        super()._apply(fn, recurse)
        if merged:
            self.merge()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged is not None:
            base = self._merged.base
            destination[prefix + "weight"] = base if keep_vars else base.detach()

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}, scaling={self.scaling:g}"]
        if self.lora_dropout > 0:
            parts.append(f"lora_dropout={self.lora_dropout:g}")
        parts += [
            f"{name}=True"
            for name in ("use_rslora", "fan_in_fan_out", "merge_weights", "merged", "prepacked")
            if getattr(self, name)
        ]
        return ", ".join(parts)


def parameter(module: nn.Module, name: str) -> Any:
    """module.<name>, several times faster where it is an ordinary Parameter.

    FSDP and parametrizations put a view or a property in its place.
    """
    parameters = module.__dict__["_parameters"]
    return parameters[name] if name in parameters else getattr(module, name)


def _initial_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    if r == 0:
        return 0.0
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
