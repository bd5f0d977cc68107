"""Adapters go from library to library and back, bit for bit."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from lora_fused import FusedLoRALinear, convert
from lora_fused import loralib as lora
from lora_fused.convert import Adapter, LayerAdapter
from tests.peft_models import GPT2_LAYERS, LLAMA_LAYERS, adapted, gpt2, llama, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"q_proj": 3, r".*\.0\..*down_proj": 7},
    },
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "trained-biases": {"bias": "lora_only"},
    "saved-modules": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def same(one: Adapter, other: Adapter) -> bool:
    """Bit-equal, with the same scalings."""

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.dtype == b.dtype and torch.equal(a, b)

    return one.layers.keys() == other.layers.keys() and all(
        equal(a.lora_A, b.lora_A)
        and equal(a.lora_B, b.lora_B)
        and equal(a.lora_bias, b.lora_bias)
        and equal(a.magnitude, b.magnitude)
        and a.scaling == b.scaling
        for a, b in ((layer, other.layers[name]) for name, layer in one.layers.items())
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_files_come_back_byte_for_byte(tmp_path: Path, config: dict[str, Any]) -> None:
    model = adapted(llama(), **config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = convert.from_peft(tmp_path / "theirs")
    convert.to_peft(adapter, tmp_path / "ours")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert same(convert.from_peft(model), adapter)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        assert layer.scaling == layers[name].scaling["default"], name
        assert layer.rank == layers[name].r["default"], name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_written_from_nothing_loads_in_peft(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    model = adapted(llama(), **config)
    base = llama()
    base.load_state_dict(model.unload().state_dict())
    model = adapted(copy.deepcopy(base), **config).eval()
    adapter = convert.from_peft(model)
    settings = {k: v for k, v in config.items() if k in ("bias", "modules_to_save")}
    convert.to_peft(replace(adapter, peft_config=settings), tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert same(convert.from_peft(loaded), adapter)


def test_the_patterns_that_are_written() -> None:
    layers = {
        f"layers.{i}.{kind}": LayerAdapter(torch.ones(r, 4), torch.ones(6, r), alpha)
        for i, kind, r, alpha in (
            (0, "q", 2, 8), (1, "q", 2, 8), (0, "k", 4, 8), (1, "k", 4, 3), (0, "v", 4, 8),
            (1, "v", 8, 8), (0, "o", 4, 8),
        )
    }  # fmt: skip
    config = convert.to_peft(Adapter(layers))[1]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, False)
    assert config["rank_pattern"] == {"q": 2, "^layers.1.v": 8}
    assert config["alpha_pattern"] == {"^layers.1.k": 3}
    assert config["target_modules"] == sorted(layers)


def test_no_adapter_appears_where_there_was_none(tmp_path: Path) -> None:
    """The checkpoint has layer 0 only; a target such as "q_proj" would be in all layers."""
    model = adapted(llama(), target_modules=["q_proj"], layers_to_transform=[0])
    adapter = replace(convert.from_peft(model), peft_config={})
    convert.to_peft(adapter, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert list(convert.from_peft(loaded).layers) == list(adapter.layers)
    assert len(adapter.layers) == 1


def test_parts_that_share_memory_are_written(tmp_path: Path) -> None:
    joined = LayerAdapter(torch.randn(4, 8), torch.randn(6, 4), 8.0)
    parts = convert.split_layers(Adapter({"m.qkv": joined}), "qkv", {"q": 4, "k": 2})
    convert.to_peft(parts, tmp_path)
    back = convert.from_peft(tmp_path)
    assert same(back, parts)
    again = convert.join_layers(back, ["q", "k"], "qkv").layers["m.qkv"]
    assert torch.equal(again.lora_B, joined.lora_B) and torch.equal(again.lora_A, joined.lora_A)


def test_some_layers_with_rslora() -> None:
    a, b = torch.ones(4, 3), torch.ones(5, 4)
    mixed = Adapter({"x": LayerAdapter(a, b, 6.0, use_rslora=True), "y": LayerAdapter(a, b, 12.0),
                     "z": LayerAdapter(a, b, 5.0)})  # fmt: skip
    tensors, config = convert.to_peft(mixed)
    assert (config["use_rslora"], config["alpha_pattern"]) == (False, {"z": 5})
    assert same(convert.from_peft((tensors, config)), mixed)


def merged_model(library: Any) -> nn.Module:
    model = nn.ModuleDict({
        "wte": library.Embedding(11, 12, r=2, lora_alpha=4),
        "c_attn": library.MergedLinear(12, 36, r=4, lora_alpha=8, enable_lora=[True, False, True]),
        "c_fc": library.Linear(12, 20, r=3, lora_alpha=6),
    })  # fmt: skip
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


MERGED = {"c_attn": [True, False, True]}


@pytest.mark.parametrize("library", ["loralib", "lora_fused.loralib"])
def test_loralib(library: str, tmp_path: Path) -> None:
    module = pytest.importorskip(library)
    model = merged_model(module)
    state = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    adapter = convert.from_loralib(model)
    assert {n: layer.scaling for n, layer in adapter.layers.items()} == {
        "wte": 2.0, "c_attn": 2.0, "c_fc": 2.0,
    }  # fmt: skip
    for suffix in ("pt", "safetensors"):
        convert.write_tensors(state, tmp_path / f"lora.{suffix}")
        again = convert.to_loralib(
            convert.from_loralib(tmp_path / f"lora.{suffix}", lora_alpha=8, merged=MERGED),
            merged=MERGED,
        )
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    back = convert.to_loralib(adapter, merged=MERGED)
    other = merged_model(lora)
    assert not other.load_state_dict(back, strict=False).unexpected_keys
    x = torch.randn(5, 12)
    weights = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    other.load_state_dict(weights, strict=False)
    for name in ("c_attn", "c_fc"):
        torch.testing.assert_close(other[name](x), model[name](x))


def test_a_merged_linear_as_a_layer_of_peft() -> None:
    merged = merged_model(lora)["c_attn"]
    base = nn.ModuleDict({"c_attn": nn.Linear(12, 36)})
    base["c_attn"].load_state_dict({"weight": merged.weight, "bias": merged.bias})
    adapter = convert.from_loralib(nn.ModuleDict({"c_attn": merged}))
    tensors, config = convert.to_peft(adapter)
    model = get_peft_model(base, LoraConfig(**{k: config[k] for k in ("r", "lora_alpha")},
                                            target_modules=["c_attn"]))  # fmt: skip
    set_peft_model_state_dict(model, tensors)
    x = torch.randn(5, 12)
    torch.testing.assert_close(model.base_model.model["c_attn"](x), merged(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kohya(dtype: torch.dtype, tmp_path: Path) -> None:
    names = ["down_blocks.0.attn_1.to_q", "mid_block.to_out.0", "conv_in"]
    tensors = {}
    for i, name in enumerate(names):
        stem = f"lora_unet_{name.replace('.', '_')}"
        conv = (3, 3) if name == "conv_in" else ()
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, 6, *conv).to(dtype)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(8, 4, *(1 for _ in conv)).to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(2.5 + i, dtype=dtype)
    convert.write_tensors(tensors, tmp_path / "file.safetensors")
    adapter = convert.from_kohya(tmp_path / "file.safetensors", names)
    assert [adapter.layers[name].scaling for name in names] == [2.5 / 4, 3.5 / 4, 4.5 / 4]
    again = convert.to_kohya(adapter)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype
    assert same(convert.from_peft(convert.to_peft(adapter)), adapter)


def test_kohya_without_alpha_and_with_prefixes() -> None:
    tensors = {"lora_te_a_b.lora_down.weight": torch.ones(4, 3),
               "lora_te_a_b.lora_up.weight": torch.ones(5, 4),
               "lora_unet_c.lora_down.weight": torch.ones(2, 3),
               "lora_unet_c.lora_up.weight": torch.ones(5, 2)}  # fmt: skip
    assert convert.from_kohya(tensors, ["a.b"], "lora_te").layers["a.b"].scaling == 1.0
    model = nn.ModuleDict({"c": nn.Linear(3, 5)})
    assert list(convert.from_kohya(tensors, model).layers) == ["c"]
    rs = Adapter({"c": LayerAdapter(torch.ones(4, 3), torch.ones(5, 4), 3.0, use_rslora=True)})
    assert convert.to_kohya(rs)["lora_unet_c.alpha"] == 6.0


@pytest.mark.parametrize("shared", [True, False], ids=["one-A", "own-A"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_split_and_join(shared: bool, use_rslora: bool) -> None:
    a = torch.randn(3, 8)
    layers = {
        f"mlp.{part}": LayerAdapter(
            a if shared else torch.randn(r, 8), torch.randn(n, 3 if shared else r),
            6.0 * (1 if shared or use_rslora else r / 3), use_rslora, lora_bias=torch.randn(n),
        )
        for part, n, r in (("gate_proj", 10, 3), ("up_proj", 7, 3 if use_rslora else 2))
    }  # fmt: skip
    adapter = Adapter({**layers, "other": next(iter(layers.values()))})
    joined = convert.join_layers(adapter, ["gate_proj", "up_proj"], "gate_up_proj")
    whole = joined.layers["mlp.gate_up_proj"]
    assert list(joined.layers) == ["mlp.gate_up_proj", "other"]
    assert whole.rank == (3 if shared else sum(layer.rank for layer in layers.values()))
    x = torch.randn(2, 8, dtype=torch.float64)

    def delta(layer: LayerAdapter) -> Tensor:
        return layer.scaling * (x @ layer.lora_A.double().T @ layer.lora_B.double().T)

    expected = torch.cat([delta(layer) for layer in layers.values()], dim=1)
    torch.testing.assert_close(delta(whole), expected)
    split = convert.split_layers(joined, "gate_up_proj", {"gate_proj": 10, "up_proj": 7})
    for name, layer in layers.items():
        back = split.layers[name]
        assert back.scaling == pytest.approx(layer.scaling, rel=1e-15)
        for field in ("lora_A", "lora_B", "lora_bias"):
            assert torch.equal(getattr(back, field), getattr(layer, field))


def test_a_fresh_adapter_survives_split_and_join() -> None:
    """lora_B = 0 has no blocks to be seen."""
    joined = LayerAdapter(torch.randn(4, 8), torch.zeros(6, 4), 8.0)
    parts = convert.split_layers(Adapter({"qkv": joined}), "qkv", {"q": 4, "k": 2})
    again = convert.join_layers(parts, ["q", "k"], "qkv").layers["qkv"]
    assert torch.equal(again.lora_A, joined.lora_A) and torch.equal(again.lora_B, joined.lora_B)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_onto_a_live_model(build: Any) -> None:
    model = adapted(build(), use_rslora=True, rank_pattern={"q_proj": 2, "c_fc": 2}).eval()
    adapter = convert.from_peft(model)
    expected = model(tokens()).logits
    plain = convert.apply_to(model.unload(), adapter)
    layers = [m for m in plain.modules() if isinstance(m, FusedLoRALinear)]
    assert len(layers) == (LLAMA_LAYERS if build is llama else GPT2_LAYERS)
    torch.testing.assert_close(plain(tokens()).logits, expected)
    assert same(convert.from_loralib(plain), adapter)
    doubled = {n: replace(layer, alpha=2 * layer.alpha) for n, layer in adapter.layers.items()}
    convert.apply_to(plain, Adapter(doubled))
    assert same(convert.from_loralib(plain), Adapter(doubled))
    assert not torch.allclose(plain(tokens()).logits, expected)


def test_scaling_of_a_live_layer_counts() -> None:
    layer = FusedLoRALinear(3, 5, r=2, lora_alpha=4)
    layer.scaling = 0.75
    adapter = convert.from_loralib(nn.ModuleDict({"x": layer}))
    assert adapter.layers["x"].scaling == 0.75


def test_renamed() -> None:
    layer = LayerAdapter(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    adapter = Adapter({"a.b": layer}, {"a.bias": torch.ones(3)})
    assert list(adapter.renamed(lambda name: f"x.{name}").layers) == ["x.a.b"]
    with pytest.raises(ValueError, match="two layers would get one name"):
        adapter.renamed(lambda name: "x")


A, B = torch.ones(2, 3), torch.ones(5, 2)
DORA = Adapter({"x": LayerAdapter(A, B, 1.0, magnitude=torch.ones(5))})
REFUSED: dict[str, tuple[Any, str]] = {
    "shapes": (lambda: LayerAdapter(A, torch.ones(5, 3), 1.0),
               r"lora_A has shape \[2, 3\] and lora_B \[5, 3\], expected \[r, in\]"),
    "not lora": (lambda: convert.from_peft(({}, {"peft_type": "LOHA"})), "is a LOHA, expected"),
    "half": (lambda: convert.from_peft(({"x.lora_A.weight": A}, {})), "no x.lora_B.weight"),
    "other half": (lambda: convert.from_peft(({"x.lora_B.weight": A}, {})), "no x.lora_A.weight"),
    "alpha": (lambda: convert.from_loralib({"x.lora_A": A, "x.lora_B": B}), "lora_alpha is None"),
    "merged": (lambda: convert.from_loralib({"x.lora_A": A, "x.lora_B": torch.ones(5, 1)},
                                            lora_alpha=1), "pass its enable_lora in merged"),
    "conv": (lambda: convert.from_loralib(nn.ModuleDict({"x": lora.Conv2d(2, 2, 3, r=1)})),
             "convolutions have no counterpart"),
    "dora": (lambda: convert.to_loralib(DORA), "magnitude, which loralib cannot express"),
    "dora live": (lambda: convert.apply_to(nn.ModuleDict({"x": nn.Linear(3, 5)}), DORA),
                  "magnitude, which FusedLoRALinear cannot express"),
    "blocks": (lambda: convert.to_loralib(
        Adapter({"x": LayerAdapter(A, torch.ones(4, 2), 1.0)}), merged={"x": [True, True]}),
        "not block-diagonal"),
    "kohya name": (lambda: convert.from_kohya({"lora_unet_x_y.lora_down.weight": A}, ["z"]),
                   "no module has such a name"),
    "kohya names": (lambda: convert.from_kohya({}, ["a.b_c", "a_b.c"]), "are both a_b_c"),
    "rows": (lambda: convert.split_layers(Adapter({"x": LayerAdapter(A, B, 1.0)}), "x",
                                          {"a": 2, "b": 2}), r"2 \+ 2 rows, expected 5"),
    "part": (lambda: convert.join_layers(Adapter({"x": LayerAdapter(A, B, 1.0)}), ["x", "y"], "z"),
             "no adapter for y"),
    "no module": (lambda: convert.apply_to(nn.Linear(3, 5), Adapter({"x": LayerAdapter(A, B, 1.)})),
                  "the model has no module 'x'"),
    "kind": (lambda: convert.apply_to(nn.ModuleDict({"x": nn.Embedding(3, 5)}),
                                      Adapter({"x": LayerAdapter(A, B, 1.0)})),
             "x is a Embedding, expected nn.Linear"),
    "size": (lambda: convert.apply_to(nn.ModuleDict({"x": nn.Linear(3, 4)}),
                                      Adapter({"x": LayerAdapter(A, B, 1.0)})),
             r"the adapter of x is for \[5, 3\], the layer is \[4, 3\]"),
    "adapter": (lambda: convert.from_peft(adapted(llama()), "second"), "has no adapter 'second'"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_state_dict(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(TypeError, match="holds a list, expected a state dict"):
        convert.read_tensors(tmp_path / "x.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FileNotFoundError):
        convert.from_peft(tmp_path)
