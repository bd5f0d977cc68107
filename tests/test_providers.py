"""The contenders of the benchmarks: each is right, or says why it is not there, or is found out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import models
from benchmarks.__main__ import cases_of, parse
from benchmarks.numerics import Checker, Verdict
from benchmarks.providers import (
    ALL_PROVIDERS,
    FORCED,
    FROZEN,
    PEERS,
    PROVIDERS,
    NotServed,
    Provider,
    axolotl,
    compiled,
    named,
    strategies,
)
from benchmarks.providers.imported import leaving_others_alone
from benchmarks.record import ERROR, NOT_SERVED, OK, WRONG, Record
from benchmarks.run import Settings, run
from benchmarks.shapes import RANKS, TOKENS, Case, Layer, parse_layer, product_cases
from benchmarks.tensors import CaseTensors, make_tensors
from lora_fused import FusedLoRALinear, backends
from lora_fused.config import Problem
from lora_fused.devices import DEVICES
from lora_fused.functional import draw_seed
from lora_fused.reference import dropout_threshold
from tests import fake_backend, fake_peers
from tests.gpu_double import pretended_gpu

SETTINGS = Settings("quick", rounds=3, memory=False)
PLAIN = Layer("tiny", "plain", 96, 64)
BIASED = Layer("tiny", "biased", 96, 64, bias=True)
CONV1D = Layer("tiny", "conv1d", 96, 64, bias=True, fan_in_fan_out=True)
BY_NAME = {p.name: p for p in ALL_PROVIDERS}
FAKED = ("unsloth", "axolotl", "lorafusion", "chalk")


def verdict(provider: Provider, case: Case, dropout: float = 0.0) -> Verdict:
    t = make_tensors(case)
    return Checker(case, t).check(provider, provider.build(t, dropout), dropout)


def records_of(providers: list[Provider], case: Case) -> dict[str, Record]:
    threads = torch.get_num_threads()
    try:
        results = run(SETTINGS, [case], [BY_NAME[FROZEN], *providers])
    finally:
        torch.set_num_threads(threads)
    return {r.provider: r for r in results.records if r.pass_ == "F+B"}


# Which there are


def test_a_run_that_names_none_has_the_same_seven() -> None:
    assert [p.name for p in named(None)] == [p.name for p in PROVIDERS] == [
        "frozen", "naive", "smart", "peft", "loralib", "ours", "ours-prepacked",
    ]  # fmt: skip


def test_names_and_groups() -> None:
    assert [p.name for p in named(["lycoris", "smart"])] == [FROZEN, "smart", "lycoris"]
    assert named(["peers"]) == [BY_NAME[FROZEN], *PEERS]
    assert named(["strategies", "default"]) == [*PROVIDERS, *FORCED]
    assert named(["all"]) == list(ALL_PROVIDERS)
    assert len({p.name for p in ALL_PROVIDERS}) == len(ALL_PROVIDERS)
    assert parse(["--providers", "peers", "ours"]).providers == ["peers", "ours"]
    with pytest.raises(SystemExit):
        parse(["--providers", "nobody"])


def test_the_documentation_names_them_all() -> None:
    page = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text()
    assert [p.name for p in (*PROVIDERS, *PEERS) if f"`{p.name}`" not in page] == []


def test_why_a_provider_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAKED:
        patched = replace(BY_NAME[name], needs=f"no_such_{name}")
        assert patched.missing("cuda") == f"no_such_{name} is not installed"
    with monkeypatch.context() as patch:
        fake_peers.install(patch)
        assert BY_NAME["chalk"].missing() == "its kernels need CUDA"
        assert BY_NAME["lorafusion"].missing() == "its kernels need CUDA"
        assert BY_NAME["chalk"].missing("cuda") is None
        assert BY_NAME["unsloth"].missing() is None
        for spec, reason in (
            (None, "axolotl's kernels need bitsandbytes, not installed"),
            (1, None),
        ):
            patch.setattr(axolotl, "find_spec", lambda name, spec=spec: spec)
            assert BY_NAME["axolotl"].missing() == reason
    assert BY_NAME["ours-cuda-decode"].missing() == "it is for GPUs"
    assert BY_NAME["ours-cpu-own"].missing("cuda") == "it is for CPUs"
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert BY_NAME["compile-peft"].missing() == "torch.compile finds no C++ compiler"


# Each is right


CASES = [Case(PLAIN, "bf16", 33, 16), Case(BIASED, "fp32", 4, 8), Case(CONV1D, "bf16", 16, 8)]


@pytest.mark.parametrize(
    ("provider", "case"),
    [
        pytest.param(provider, case, id=f"{provider.name}-{case.layer.name}")
        for provider in ALL_PROVIDERS
        for case in (CASES[:1] if provider.lacks is compiled.lacks else CASES)
    ],
)
def test_every_provider_of_this_machine_is_right(provider: Provider, case: Case) -> None:
    """Peers that are not installed are left out; the doubles below stand for them."""
    if missing := provider.missing():
        pytest.skip(missing)
    try:
        found = verdict(provider, case)
    except NotServed as reason:
        assert provider in PEERS, reason
        return
    assert found.status == OK, found.message
    outputs = {"y", "dx"} if not provider.lora else {"y", "dx", "da", "db"}
    assert set(found.error_ratios) == outputs


@pytest.mark.parametrize("provider", [p for p in FORCED if p.native], ids=lambda p: p.name)
def test_dropout_of_forced_strategies_is_the_layers(provider: Provider) -> None:
    if missing := provider.missing():
        pytest.skip(missing)
    found = verdict(provider, Case(PLAIN, "bf16", 33, 16), dropout=0.25)
    assert found.status == OK and found.error_ratios, found.message


@pytest.mark.parametrize("name", ["peft-fp32", "ours-fp32"])
def test_adapters_in_fp32_over_a_bf16_base(name: str) -> None:
    if missing := BY_NAME[name].missing():
        pytest.skip(missing)
    built = BY_NAME[name].build(make_tensors(Case(PLAIN, "bf16", 8, 8)), 0.0)
    assert [a.dtype for a in built.adapters] == [torch.float32] * 2
    dx, da, db = built.forward_backward()
    assert (dx.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    with pytest.raises(NotServed, match=r"the whole case is torch\.float32"):
        BY_NAME[name].build(make_tensors(Case(PLAIN, "fp32", 8, 8)), 0.0)


def test_a_merged_weight_without_scaling_is_wrong() -> None:
    def forgetful(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
        return BY_NAME["merged"].layer(replace(t, scaling=1.0), dropout)

    found = verdict(replace(BY_NAME["merged"], layer=forgetful), Case(BIASED, "fp32", 4, 8))
    assert found.status == WRONG and found.error_ratios["y"] > 100


def test_every_compiled_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More layers than dynamo recompiles one function for; an error, not eager, if it gave up."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=count, **options))
    layers = torch._dynamo.config.recompile_limit + 2
    for M in range(1, layers + 1):
        BY_NAME["compile-naive"].build(make_tensors(Case(PLAIN, "fp32", M, 4)), 0.0).forward()
    assert len(graphs) == layers


def test_dropout_is_right_under_a_mask_that_torch_draws_and_under_no_other() -> None:
    """As lora_fused drops where a GPU's own kernels are not used (functional.py)."""

    def drawing(t: CaseTensors, dropout: float) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            draw_seed(x.device)
            p = dropout_threshold(dropout) / 65536
            keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1.0 - p)
            return x @ t.w.t() + t.scaling / (1 - p) * ((x * keep) @ t.a.t() @ t.b.t())

        return call

    provider = Provider("drawing", "drawing", drawing, ours=True)
    assert verdict(provider, Case(PLAIN, "fp32", 33, 16), 0.25).status == OK
    stranger = replace(BY_NAME["naive"], ours=True)
    found = verdict(stranger, Case(PLAIN, "fp32", 33, 16), 0.25)
    assert found.status == WRONG and found.error_ratios["dx"] > 100


# Peers that are not on this machine: doubles with the interfaces of their sources


@pytest.mark.parametrize("name", FAKED)
def test_adapters_call_what_the_peers_offer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    fake_peers.install(monkeypatch)
    layer = PLAIN if name == "unsloth" else BIASED
    for dtype in ("fp32", "bf16"):
        found = verdict(BY_NAME[name], Case(layer, dtype, 6, 16))
        assert found.status == OK and set(found.error_ratios) == {"y", "dx", "da", "db"}


def test_what_peers_leave_to_peft_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    fake_peers.install(monkeypatch)
    conv1d, plain = (make_tensors(Case(layer, "fp32", 4, 8)) for layer in (CONV1D, PLAIN))
    sixteen = make_tensors(Case(CONV1D, "fp32", 4, 16))
    for name, t, dropout, reason in (
        ("unsloth", conv1d, 0.0, "layers with a bias"),
        ("axolotl", conv1d, 0.0, r"stores \[in, out\]"),
        ("lorafusion", sixteen, 0.0, r"stores \[in, out\]"),
        ("lorafusion", plain, 0.0, "ranks 16, 32, 64, …, got 8"),
        ("chalk", plain, 0.05, "layers with dropout"),
        ("lycoris", plain, 0.05, "not of x"),
    ):
        with pytest.raises(NotServed, match=reason):
            BY_NAME[name].build(t, dropout)
    monkeypatch.setattr("chalk.ops.lora.load_lora", lambda: None)
    with pytest.raises(NotServed, match="self-test on this device failed"):
        BY_NAME["chalk"].build(plain, 0.0)


def test_a_run_goes_on_past_peers_that_lie_crash_or_decline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft")
    fake_peers.install(monkeypatch, lies=True)
    monkeypatch.setattr("axolotl.kernels.lora.apply_lora_linear", lambda proj, X: X.nonsense)
    names = ("unsloth", "axolotl", "ours-fp32", "ours")
    present = [replace(BY_NAME[name], lacks=lambda device: None) for name in names]
    found = records_of(present, Case(PLAIN, "fp32", 4, 8))
    status = {name: record.status for name, record in found.items()}
    assert status == {
        FROZEN: OK, "unsloth": WRONG, "axolotl": ERROR, "ours-fp32": NOT_SERVED, "ours": OK
    }  # fmt: skip
    assert {name for name, record in found.items() if record.timed} == {FROZEN, "ours"}
    assert "AttributeError" in found["axolotl"].message
    assert found["ours-fp32"].message.startswith("the whole case is torch.float32")
    assert found["unsloth"].error_ratio is not None and found["unsloth"].error_ratio > 100


def test_what_a_peer_patches_at_import_is_put_back() -> None:
    linear, function = torch.nn.Linear.forward, torch.nn.functional.linear
    with (
        pytest.warns(UserWarning, match=r"importing peer replaced torch\.nn\.Linear\.forward"),
        pytest.warns(UserWarning, match=r"replaced torch\.nn\.functional\.linear: put back"),
        leaving_others_alone("peer"),
    ):
        torch.nn.Linear.forward = lambda self, x: x  # type: ignore[method-assign]
        torch.nn.functional.linear = lambda x, w, b=None: x  # type: ignore[assignment]
    assert torch.nn.Linear.forward is linear and torch.nn.functional.linear is function
    with warnings.catch_warnings(), leaving_others_alone("peer"):
        warnings.simplefilter("error")


# Ours with its choice taken away


def test_forced_strategies_on_the_cpu_are_the_forced_ones() -> None:
    if missing := BY_NAME["ours-cpu"].missing():
        pytest.skip(missing)
    t = make_tensors(Case(PLAIN, "bf16", 33, 16))
    for strategy in strategies.STRATEGIES["cpu"]:
        built = BY_NAME[f"ours-cpu-{strategy}"].build(t, 0.0)
        built.forward()
        built.forward_backward()
        configs = {recorded: route.config for recorded, route in built.call.routes.items()}  # type: ignore[attr-defined]
        assert {c.forward for c in configs.values()} == {strategy} and set(configs) == {True, False}
        assert (built.call.packed is not None) == (strategy == "packed")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("backend", "strategy", "M"),
    [
        ("triton", "split", 8192),
        ("triton", "one_pass", 8192),
        ("triton", "decode", 1),
        ("cuda", "split", 8192),
        ("cuda", "s_first", 8192),
        ("cuda", "decode", 1),
    ],
)
def test_gpu_strategies_have_tiles_or_say_no(backend: str, strategy: str, M: int) -> None:
    if backends.load(backend) is None:
        pytest.skip(backends.why_missing(backend))
    needs = frozenset({"x", "lora_A", "lora_B"})
    problem = Problem(
        M, 4096, 4096, 16, torch.bfloat16, "cuda", torch.bfloat16, needs=needs,
        device=DEVICES["H100"],
    )  # fmt: skip
    config = strategies.config_for(problem, backend, strategy)
    dx = "library" if (backend, strategy) == ("cuda", "decode") else strategy
    assert (config.backend, config.forward, config.dx) == (backend, strategy, dx)
    assert None not in (config.forward_tiles, config.reduce_tiles)
    assert (config.dx_tiles is None) == (dx == "library")
    if strategy == "decode":
        with pytest.raises(NotServed, match=f"{backend} has no decode kernel for M=8192"):
            strategies.config_for(replace(problem, M=8192), backend, strategy)
    with pytest.raises(NotServed, match=f"{backend} cannot run M={M} .*float64"):
        strategies.config_for(replace(problem, dtype=torch.float64), backend, strategy)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("strategy", strategies.STRATEGIES["triton"])
def test_forced_strategies_run_on_a_gpu_double(strategy: str, dropout: float) -> None:
    provider, case = BY_NAME[f"ours-triton-{strategy}"], Case(BIASED, "fp32", 6, 8)
    with pretended_gpu():
        assert provider.missing("cuda") is None
        t = make_tensors(case)
        built = provider.build(t, dropout)
        assert Checker(case, t).check(provider, built, dropout).status == OK
        did = set(fake_backend.calls)
    assert ("shrink" in did) == (strategy == "split")
    assert any("shrink_matmul" in call for call in did) == (strategy != "split")


def test_a_backend_by_name() -> None:
    t = make_tensors(Case(PLAIN, "fp32", 6, 8))
    with pretended_gpu():
        for name in ("torch", "triton"):
            layer = BY_NAME[f"ours-{name}"].build(t, 0.05).call
            assert isinstance(layer, FusedLoRALinear)
            assert (layer.backend, layer.lora_dropout) == (name, 0.05)
        with pytest.raises(NotServed, match=r"cuda cannot run M=6 .*not in this installation"):
            BY_NAME["ours-cuda"].build(t, 0.0)


# Shapes


def test_layers_of_models_and_of_the_peers_benchmarks() -> None:
    keys = [layer.key for layer in (*models.MODELS, *models.PEERS)]
    assert len(keys) == len(set(keys))
    assert {layer.model for layer in models.MODELS} >= {
        "gpt2", "roberta-base", "deberta-v2-xxl", "gpt3-175b", "llama-3.2-1b", "llama-3.2-3b",
        "llama-3.1-8b", "llama-3.3-70b", "qwen2.5-7b", "mistral-7b", "smollm2-135m",
    }  # fmt: skip
    assert {layer.model for layer in models.PEERS} == {
        "lorafusion", "chalk", "axolotl", "nemo", "lycoris", "vllm"
    }  # fmt: skip
    assert all(layer.tokens and layer.ranks for layer in models.PEERS)
    assert [layer.bias for layer in parse_layer("qwen2.5-7b")] == [True, True, False, False, False]
    assert all(layer.fan_in_fan_out for layer in parse_layer("gpt2-medium"))


def test_gpt2s_parameters_are_its_layers() -> None:
    """12 blocks of these layers are the 85 M parameters of GPT-2 small without its embeddings."""
    block = sum(layer.K * layer.N + layer.N for layer in parse_layer("gpt2"))
    norms = 4 * 768
    assert 12 * (block + norms) + 2 * 768 == 124_439_808 - (50257 + 1024) * 768


def test_a_peers_shape_brings_its_tokens_and_ranks() -> None:
    (ragged,) = product_cases(parse_layer("nemo"), ["bf16"])
    assert (ragged.M, ragged.layer.K, ragged.layer.N, ragged.R) == (100, 500, 224, 8)
    named_ones = cases_of(parse(["--full", "--layers", "nemo", "--m", "3", "--r", "2", "4"]))
    assert {(c.M, c.R) for c in named_ones} == {(3, 2), (3, 4)}
    default = product_cases(parse_layer("llama-3.2-3b.q"), ["bf16"])
    assert [(c.M, c.R) for c in default] == [(M, R) for M in TOKENS for R in RANKS]
