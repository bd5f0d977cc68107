"""PEFT's checkpoints: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_fused.convert.adapter import Adapter, LayerAdapter
from lora_fused.convert.files import pairs, read_tensors, write_tensors

PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAGNITUDE = ".lora_magnitude_vector"

_DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
    "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0, "modules_to_save": None,
}  # fmt: skip


def from_peft(
    source: str | os.PathLike[str] | nn.Module | tuple[Mapping[str, Tensor], Mapping[str, Any]],
    adapter_name: str = "default",
) -> Adapter:
    """A LoRA adapter of PEFT: a saved folder, a live model, or (tensors, config) as to_peft gives.

    Ranks are those of the tensors; alphas follow lora_alpha, alpha_pattern and use_rslora. Tensors
    are not copied. adapter_name: which adapter of a live model.

    Raises ValueError for a checkpoint that is not LoRA or not whole.
    """
    tensors, config = _read(source, adapter_name)
    if str(config.get("peft_type", "LORA")).split(".")[-1] != "LORA":
        raise ValueError(f"from_peft: the adapter is a {config['peft_type']}, expected LORA.")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    linear, others = pairs(tensors, ".lora_A.weight", ".lora_B.weight")
    embedding, others = pairs(others, ".lora_embedding_A", ".lora_embedding_B")
    layers = {}
    for name, (a, b) in {**linear, **embedding}.items():
        layers[name] = LayerAdapter(
            a, b, _value(config, "alpha", name),
            use_rslora=bool(config.get("use_rslora")),
            lora_bias=others.pop(f"{name}.lora_B.bias", None),
            magnitude=others.pop(name + _MAGNITUDE, None),
            embedding=name in embedding,
        )  # fmt: skip
    return Adapter(layers, others, dict(config))


def to_peft(
    adapter: Adapter, folder: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of PEFT's files; written to a folder if one is given.

    What came from PEFT goes back byte for byte. Otherwise the most common rank and alpha become r
    and lora_alpha, and the others entries of rank_pattern and alpha_pattern. If only some layers
    use rsLoRA, theirs is written as alpha · √r.
    """
    tensors: dict[str, Tensor] = {PREFIX + key: t for key, t in adapter.others.items()}
    for name, layer in adapter.layers.items():
        part = ".lora_embedding_{}" if layer.embedding else ".lora_{}.weight"
        tensors[PREFIX + name + part.format("A")] = layer.lora_A
        tensors[PREFIX + name + part.format("B")] = layer.lora_B
        if layer.lora_bias is not None:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = layer.lora_bias
        if layer.magnitude is not None:
            tensors[PREFIX + name + _MAGNITUDE] = layer.magnitude
    config = _config(adapter)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, Path(folder) / TENSORS)
        text = json.dumps(config, indent=2, sort_keys=True)
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")
    return tensors, config


def _read(source: Any, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(source, tuple):
        return dict(source[0]), dict(source[1])
    if not isinstance(source, nn.Module):
        config = json.loads((Path(source) / CONFIG).read_text(encoding="utf-8"))
        return read_tensors(Path(source) / TENSORS), config
    from peft import get_peft_model_state_dict

    configs: Any = getattr(source, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"from_peft: the model has no adapter {adapter_name!r}, found {list(configs)}."
        )
    tensors = get_peft_model_state_dict(
        source, adapter_name=adapter_name, save_embedding_layers=False
    )
    return dict(tensors), _as_saved(configs[adapter_name].to_dict())


def _as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary with what JSON knows: sets sorted, enums as their values."""
    plain: dict[str, Any] = json.loads(json.dumps(
        config, default=lambda v: sorted(v) if isinstance(v, set) else getattr(v, "value", None)
    ))  # fmt: skip
    return plain


def _value(config: Mapping[str, Any], what: str, name: str) -> float:
    """The rank or alpha that a config gives a module; PEFT takes the first pattern that fits."""
    for pattern, value in (config.get(f"{what}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    default = 8  # PEFT's, for both
    return float(config.get("r" if what == "rank" else "lora_alpha", default))


def _config(adapter: Adapter) -> dict[str, Any]:
    layers = adapter.layers
    config = {**_DEFAULTS, **adapter.peft_config}
    rslora = bool(layers) and all(layer.use_rslora for layer in layers.values())
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {n: layer.alpha if rslora else layer.plain_alpha for n, layer in layers.items()}
    if adapter.peft_config and _says(config, ranks, alphas, rslora):
        return dict(adapter.peft_config)
    r, lora_alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        **config,
        "r": r, "rank_pattern": _pattern(ranks, r),
        "lora_alpha": _number(lora_alpha), "alpha_pattern": _pattern(alphas, lora_alpha),
        "use_rslora": rslora,
        "target_modules": sorted(layers),
        "lora_bias": any(layer.lora_bias is not None for layer in layers.values()),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
    }  # fmt: skip


def _says(
    config: Mapping[str, Any], ranks: dict[str, int], alphas: dict[str, float], rslora: bool
) -> bool:
    """Whether a config describes these layers already."""
    targets = config.get("target_modules")
    known = not isinstance(targets, list) or all(
        any(name == target or name.endswith(f".{target}") for target in targets) for name in ranks
    )
    return (
        known
        and bool(config.get("use_rslora")) == rslora
        and all(_value(config, "rank", name) == rank for name, rank in ranks.items())
        and all(_value(config, "alpha", name) == alpha for name, alpha in alphas.items())
    )


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The entries for layers whose value is not the default, by their last names if possible."""
    pattern = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            wanted = {name for name, own in values.items() if own == value}
            for key in _shortest(list(values), wanted):
                literal = re.escape(key).replace(r"\.", ".")
                pattern[literal if "." not in key else f"^{literal}"] = _number(value)
    return pattern


def _shortest(names: list[str], wanted: set[str]) -> list[str]:
    """Last components that stand for wanted names only, else full names."""
    keys: dict[str, None] = {}
    for name in names:
        last = name.rsplit(".", 1)[-1]
        alike = {other for other in names if other.rsplit(".", 1)[-1] == last}
        if name in wanted:
            keys[last if not last.isdigit() and alike <= wanted else name] = None
    return list(keys)


def _most_common(values: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else 8


def _number(value: float) -> float:
    """8 rather than 8.0: PEFT types alpha as an integer, and takes either."""
    return int(value) if float(value).is_integer() else value
