"""`python -m benchmarks --model-gpu`: in line with the closed forms and tables of the studies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import model_gpu
from benchmarks.model_gpu import device_named, row
from lora_fused.devices import DEVICES

H100 = DEVICES["H100"]
SUSTAINED, DRAM = 722e12, 3.015e12  # flop/s and bytes/s that the model grants an H100
RHO = SUSTAINED / DRAM


def tax(M: int, K: int, N: int, R: int, name: str, direction: str = "forward") -> float:
    value = row(H100, direction, M, K, N, R).tax[name]
    assert value is not None
    return value


@pytest.mark.parametrize(("K", "N"), [(4096, 4096), (4096, 14336), (14336, 4096)])
def test_large_problems_follow_the_closed_forms(K: int, N: int) -> None:
    """Compute-bound, 8192 tokens: the taxes are bytes over arithmetic, ρ = flop per byte."""
    read = 100 * RHO / N
    assert tax(8192, K, N, 16, "LoRAFusion") == pytest.approx(read + 100 * (1 / 0.95 - 1), abs=1.5)
    assert tax(8192, K, N, 16, "addmm") == pytest.approx(read + 200 * RHO / K, abs=1.5)
    assert tax(8192, K, N, 16, "library") == pytest.approx(read + 100 * RHO / K, abs=1.5)
    assert tax(8192, K, N, 16, "PEFT") == pytest.approx(read + 600 * RHO / K, abs=2.0)


@pytest.mark.parametrize(
    ("M", "N", "K", "R", "peft", "addmm"),
    [
        (512, 4096, 4096, 16, 1.72, 1.37),
        (2048, 4096, 4096, 16, 1.48, 1.22),
        (8192, 4096, 4096, 16, 1.41, 1.18),
        (8192, 14336, 4096, 16, 1.36, 1.13),
        (8192, 4096, 14336, 16, 1.16, 1.09),
        (8192, 1024, 4096, 16, 1.64, 1.39),
    ],
)
def test_peft_and_addmm_cost_what_the_design_study_says(
    M: int, N: int, K: int, R: int, peft: float, addmm: float
) -> None:
    few = 0.2 if M <= 512 else 0.1  # launches weigh more, and the studies counted them differently
    assert 1 + tax(M, K, N, R, "PEFT") / 100 == pytest.approx(peft, abs=few)
    assert 1 + tax(M, K, N, R, "addmm") / 100 == pytest.approx(addmm, abs=few)


def test_the_order_of_the_designs() -> None:
    for R in (16, 64):
        for K, N in ((4096, 4096), (4096, 14336), (14336, 4096)):
            for direction in ("forward", "backward"):
                taxes = row(H100, direction, 8192, K, N, R).tax
                assert taxes["goal"] < taxes["library"] < taxes["addmm"] < taxes["PEFT"]  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_every_device_has_tables(name: str) -> None:
    found = list(model_gpu.rows(DEVICES[name], dropout=True))
    assert len(found) == 2 * 4 * (7 + 2)
    for line in found:
        assert line.frozen_us > 0
        for other in ("PEFT", "addmm", "library", "LoRAFusion"):
            value = line.tax[other]
            assert value is not None and value > 0, f"{other} is faster than the GEMM it calls"


def test_names_of_devices() -> None:
    for text, name in (("h100", "H100"), ("4090", "RTX 4090"), ("rtx-5090", "RTX 5090")):
        assert device_named(text) is DEVICES[name]
    with pytest.raises(ValueError, match="no GPU is called 'h101'; known: h100, h200"):
        device_named("h101")


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "model.json"
    words = ["--model-gpu", "a100", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words], capture_output=True, text=True, check=True
    )
    assert "modelled for A100" in done.stdout and "No number below was measured" in done.stdout
    data = json.loads(out.read_text())
    assert data["modelled"] is True and len(data["rows"]) == 72
    bad = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--model-gpu", "x"], capture_output=True, text=True
    )
    assert bad.returncode == 1 and "no GPU is called 'x'" in bad.stderr
