"""Adapters of torchtune and Megatron-Bridge: names, row orders and fused layers, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fused import convert
from lora_fused.convert import Adapter, Heads, LayerAdapter, Rotary
from lora_fused.convert.torchtune import to_hf_name, to_torchtune_name
from tests.tune import REAL, LoRALinear

HEADS, KV_HEADS, SIZE, WIDTH, RANK = 4, 2, 6, 16, 3


class Holder(nn.Module):
    pass


def tune_model(layers: int = 2) -> nn.Module:
    """torchtune's module names with a LoRALinear each, in all shapes of a Llama."""
    model = Holder()
    model.layers = nn.ModuleList()
    sizes = {
        "q_proj": (WIDTH, HEADS * SIZE), "k_proj": (WIDTH, KV_HEADS * SIZE),
        "v_proj": (WIDTH, KV_HEADS * SIZE), "output_proj": (HEADS * SIZE, WIDTH),
        "w1": (WIDTH, 20), "w2": (20, WIDTH), "w3": (WIDTH, 20),
    }  # fmt: skip
    for _ in range(layers):
        layer = Holder()
        layer.attn, layer.mlp = Holder(), Holder()
        for name, (k, n) in sizes.items():
            lora = LoRALinear(k, n, rank=RANK, alpha=6)
            nn.init.normal_(lora.lora_b.weight)
            setattr(layer.mlp if name.startswith("w") else layer.attn, name, lora)
        model.layers.append(layer)
    model.output = LoRALinear(WIDTH, 11, rank=RANK, alpha=6)
    return model


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("rotary", [Rotary(HEADS, KV_HEADS), None], ids=["permuted", "as-it-is"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_torchtune_comes_back_bit_for_bit(rotary: Any, suffix: str, tmp_path: Path) -> None:
    model = tune_model()
    state, file = lora_state(model), tmp_path / f"adapter_0.{suffix}"
    convert.write_tensors(state, file)
    live = convert.from_torchtune(model, rotary=rotary)
    adapter = convert.from_torchtune(file, rotary=rotary, lora_alpha=6)
    assert len(adapter.layers) == 15 and adapter.layers.keys() == live.layers.keys()
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.lora_B, live.layers[name].lora_B)
        assert layer.scaling == live.layers[name].scaling == 2.0
    back = convert.to_torchtune(adapter, rotary=rotary)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    through_peft = convert.from_peft(convert.to_peft(adapter))
    again = convert.to_torchtune(through_peft, rotary=rotary)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_names() -> None:
    names = {
        "layers.11.attn.q_proj": "model.layers.11.self_attn.q_proj",
        "layers.0.attn.output_proj": "model.layers.0.self_attn.o_proj",
        "layers.3.mlp.w1": "model.layers.3.mlp.gate_proj",
        "layers.3.mlp.w2": "model.layers.3.mlp.down_proj",
        "layers.3.mlp.w3": "model.layers.3.mlp.up_proj",
        "output": "lm_head",
        "encoder.proj_0": "encoder.proj_0",
    }
    assert {name: to_hf_name(name) for name in names} == names
    assert {hf: to_torchtune_name(hf) for hf in names.values()} == {h: n for n, h in names.items()}


def rotate_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """x [tokens, heads, size], turned in the planes (0, 1), (2, 3), … as torchtune does."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """The same in the planes (0, size/2), (1, size/2 + 1), … as Hugging Face does."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def test_the_permutation_is_that_of_rotary_embeddings() -> None:
    """Attention scores with Hugging Face's rotation of the permuted rows are torchtune's."""
    tokens, x = 5, torch.randn(5, WIDTH, dtype=torch.float64)
    angles = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(SIZE // 2, dtype=torch.float64)
    rotary = Rotary(HEADS, HEADS)
    q, k = (torch.randn(HEADS * SIZE, WIDTH, dtype=torch.float64) for _ in range(2))

    def scores(q: Tensor, k: Tensor, rotate: Any) -> Tensor:
        q, k = (rotate((x @ t.T).view(tokens, HEADS, SIZE), angles) for t in (q, k))
        return torch.einsum("ihd,jhd->hij", q, k)

    hf = [rotary.to_halves(f"a.{n}_proj", t) for n, t in (("q", q), ("k", k))]
    torch.testing.assert_close(scores(*hf, rotate_halves), scores(q, k, rotate_neighbours))
    assert not torch.equal(hf[0], q)
    assert torch.equal(rotary.to_neighbours("a.q_proj", hf[0]), q)


@pytest.mark.skipif(not REAL, reason="torchtune is not installed: make test-torchtune")
def test_torchtunes_own_export_agrees() -> None:
    from torchtune.models import convert_weights

    model = tune_model()
    theirs = convert_weights.tune_to_peft_adapter_weights(
        lora_state(model), num_heads=HEADS, num_kv_heads=KV_HEADS, dim=WIDTH, head_dim=SIZE
    )
    adapter = convert.from_torchtune(model, rotary=Rotary(HEADS, KV_HEADS))
    ours = convert.to_peft(adapter)[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.skipif(not REAL, reason="torchtune is not installed: make test-torchtune")
def test_a_torchtune_llama_and_transformers_agree() -> None:
    from torchtune.models import convert_weights
    from torchtune.models.llama2 import lora_llama2

    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32,
             "max_seq_len": 16, "intermediate_dim": 40}  # fmt: skip
    model = lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
        apply_lora_to_output=True, lora_rank=RANK, lora_alpha=6.0, **sizes,
    ).eval()  # fmt: skip
    for name, p in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(p, std=0.1)
    base = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    hf.load_state_dict(convert_weights.tune_to_hf(base, 4, 2, 32))
    convert.apply_to(hf, convert.from_torchtune(model, rotary=Rotary(4, 2)))
    ids = torch.randint(31, (2, 9))
    torch.testing.assert_close(hf(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not REAL, reason="torchtune is not installed: make test-torchtune")
def test_a_torchtune_llama_is_accelerated() -> None:
    from torchtune.models.llama2 import lora_llama2

    from lora_fused.integrations.torchtune import accelerate, explain

    model = lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=31,
        num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=16,
        intermediate_dim=40, lora_rank=RANK, lora_alpha=6.0,
    )  # fmt: skip
    ids = torch.randint(31, (2, 9))
    for name, p in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(p, std=0.1)
    expected = model(ids)
    accelerate(model, verbose=False, group="always")
    for _ in range(2):
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    report = explain(model)
    assert report.fused_calls == 28 and not report.stock_calls
    assert {g for s in report.groups for g in s.groups or ()} >= {("w1", "w3")}
    assert report.group_calls >= 2


class MegatronLinear(nn.Module):
    """As Megatron-Bridge's LoRALinear: to_wrap, and adapter with linear_in and linear_out."""

    def __init__(self, k: int, n: int, alpha: float = 6.0) -> None:
        super().__init__()
        self.to_wrap = nn.Linear(k, n, bias=False)
        self.adapter = Holder()
        self.adapter.linear_in = nn.Linear(k, RANK, bias=False)
        self.adapter.linear_out = nn.Linear(RANK, n, bias=False)
        self.adapter.dim, self.adapter.alpha = RANK, alpha

    def delta(self) -> Tensor:
        adapter = self.adapter
        return adapter.alpha / adapter.dim * adapter.linear_out.weight @ adapter.linear_in.weight


def megatron_model() -> nn.Module:
    model = Holder()
    model.decoder = Holder()
    model.decoder.layers = nn.ModuleList()
    for _ in range(2):
        layer = Holder()
        layer.self_attention, layer.mlp = Holder(), Holder()
        layer.self_attention.linear_qkv = MegatronLinear(WIDTH, (HEADS + 2 * KV_HEADS) * SIZE)
        layer.self_attention.linear_proj = MegatronLinear(HEADS * SIZE, WIDTH)
        layer.mlp.linear_fc1 = MegatronLinear(WIDTH, 40)
        layer.mlp.linear_fc2 = MegatronLinear(20, WIDTH)
        model.decoder.layers.append(layer)
    return model


def test_megatron_comes_back_bit_for_bit() -> None:
    model, heads = megatron_model(), Heads(HEADS, KV_HEADS)
    state = {n: t for n, t in model.state_dict().items() if ".adapter." in n}
    live = convert.from_megatron(model, heads=heads)
    adapter = convert.from_megatron(
        {f"module.{n}": t for n, t in state.items()}, heads=heads, lora_alpha=6
    )
    assert len(adapter.layers) == 14 and adapter.layers.keys() == live.layers.keys()
    for each in (live, adapter, convert.from_peft(convert.to_peft(adapter))):
        back = convert.to_megatron(each, heads=heads)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_rows_of_megatrons_qkv() -> None:
    """Group by group: the q rows of its heads, then k, then v."""
    model = megatron_model()
    delta = model.decoder.layers[1].self_attention.linear_qkv.delta()
    adapter = convert.from_megatron(model, heads=Heads(HEADS, KV_HEADS))
    q, k, v = (
        layer.scaling * layer.lora_B @ layer.lora_A
        for layer in (adapter.layers[f"model.layers.1.self_attn.{n}_proj"] for n in "qkv")
    )
    per_group = HEADS // KV_HEADS
    for group, rows in enumerate(delta.view(KV_HEADS, per_group + 2, SIZE, WIDTH)):
        heads = slice(group * per_group * SIZE, (group + 1) * per_group * SIZE)
        own = slice(group * SIZE, (group + 1) * SIZE)
        torch.testing.assert_close(rows[:per_group].reshape(-1, WIDTH), q[heads])
        torch.testing.assert_close(rows[per_group], k[own])
        torch.testing.assert_close(rows[per_group + 1], v[own])


def test_layers_with_their_own_A_become_one_for_megatron() -> None:
    heads, prefix = Heads(HEADS, KV_HEADS), "model.layers.0.self_attn"
    rows = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
    adapter = Adapter({
        f"{prefix}.{n}_proj": LayerAdapter(torch.randn(2, WIDTH), torch.randn(size, 2), 4.0)
        for n, size in rows.items()
    })  # fmt: skip
    state = convert.to_megatron(adapter, heads=heads)
    name = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
    assert state[name].shape == (6, WIDTH)
    back = convert.from_megatron(state, heads=heads, lora_alpha=12)
    for name, layer in adapter.layers.items():
        assert torch.equal(back.layers[name].lora_A, layer.lora_A)
        assert torch.equal(back.layers[name].lora_B, layer.lora_B)
        assert back.layers[name].scaling == layer.scaling


def layer(r: int = 2, alpha: float = 1.0, **fields: Any) -> LayerAdapter:
    return LayerAdapter(torch.ones(r, 3), torch.ones(4, r), alpha, **fields)


ROTARY = Rotary(HEADS, KV_HEADS)
GROUPS = Heads(HEADS, KV_HEADS)
STATE = {"x.lora_a.weight": torch.ones(2, 3), "x.lora_b.weight": torch.ones(4, 2)}
QKV = "decoder.layers.0.self_attention.linear_qkv.adapter"
REFUSED: dict[str, tuple[Any, str]] = {
    "alpha": (lambda: convert.from_torchtune(STATE, rotary=None), "lora_alpha is None"),
    "ranks": (lambda: convert.to_torchtune(Adapter({"a": layer(), "b": layer(3)}), rotary=None),
              r"one rank for all layers; this adapter has 2 \(a\), 3 \(b\)"),
    "alphas": (lambda: convert.to_torchtune(Adapter({"a": layer(), "b": layer(alpha=2.0)}),
                                            rotary=None), "one plain_alpha for all layers"),
    "bias": (lambda: convert.to_torchtune(Adapter({"a": layer(lora_bias=torch.ones(4))}),
                                          rotary=None), "lora_bias, which torchtune cannot"),
    "heads": (lambda: convert.to_torchtune(Adapter({"a.q_proj": layer()}), rotary=ROTARY),
              "4 rows are not 4 heads of even size"),
    "megatron alpha": (lambda: convert.from_megatron({f"{QKV}.linear_in.weight": torch.ones(2, 3),
                       f"{QKV}.linear_out.weight": torch.ones(8, 2)}, heads=GROUPS),
                       "lora_alpha is None"),
    "megatron rows": (lambda: convert.from_megatron({f"{QKV}.linear_in.weight": torch.ones(2, 3),
                      f"{QKV}.linear_out.weight": torch.ones(9, 2)}, heads=GROUPS, lora_alpha=1),
                      "9 rows do not fit Heads"),
    "megatron part": (lambda: convert.to_megatron(
        Adapter({"model.layers.0.self_attn.q_proj": layer()}), heads=GROUPS),
        "no adapter for model.layers.0.self_attn.k_proj"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_rslora_becomes_a_plain_alpha() -> None:
    adapter = Adapter({"a": layer(4, alpha=3.0, use_rslora=True)})
    state = convert.to_torchtune(adapter, rotary=None)
    assert adapter.layers["a"].plain_alpha == 6.0
    back = convert.from_torchtune(state, rotary=None, lora_alpha=6.0)
    assert back.layers["a"].scaling == adapter.layers["a"].scaling == 1.5
