"""PEFT's own LoRA tests with our layers in place of its own: `python tests/peft_suite.py`.

Fetches the source distribution of the installed peft by pip (the wheel has no tests) and runs the
LoRA cases of its tests/test_custom_models.py twice, stock and with every new lora.Linear
accelerated. The outcomes must be the same, none failed, and the fused calls must be many: that the
switch was on is part of the result. Takes minutes; needs the packages that PEFT's tests import:
parameterized, scipy, datasets, diffusers, pytest-timeout.

This file is also the pytest plugin of those runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

SELECTION = (
    "LoraConfig and not AdaLora and not VBLora and not RandLora and not TinyLora and not UniLora"
)
MIN_FUSED_CALLS = 500
_RESULT, _FUSED = "LORA_FUSED_SUITE_RESULT", "LORA_FUSED_SUITE_FUSED"
_counts: dict[str, Counter[str]] = {"calls": Counter(), "outcomes": Counter()}


def pytest_configure(config: Any) -> None:
    if os.environ[_FUSED] == "1":
        accelerate_every_layer()


def accelerate_every_layer() -> None:
    """Swap the class of each lora.Linear at the end of its construction, and count its calls."""
    from peft.tuners.lora.layer import Linear

    from lora_fused.integrations import peft
    from lora_fused.integrations.acceleration import Acceleration

    create = Linear.__init__

    def create_and_accelerate(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        peft.accelerate(self, verbose=False)

    class Counting(Acceleration):
        def count_stock(self, reason: str) -> None:
            _counts["calls"][f"stock: {reason}"] += 1

        def count_fused(self) -> None:
            _counts["calls"]["fused"] += 1

    Linear.__init__ = create_and_accelerate
    peft.Acceleration = Counting


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _counts["outcomes"][report.outcome] += 1


def pytest_sessionfinish(session: Any) -> None:
    Path(os.environ[_RESULT]).write_text(json.dumps(_counts))


def fetch_tests(folder: Path) -> Path:
    """The unpacked source distribution of the installed peft."""
    release = version("peft")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    build = ["--no-build-isolation", "-d", str(folder), f"peft=={release}"]
    subprocess.run([*pip, *build], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    root = folder / f"peft-{release}"
    (root / "tests" / "__init__.py").touch()
    return root


def run(root: Path, fused: bool, selection: str) -> dict[str, dict[str, int]]:
    """One run of the suite: the outcomes of its tests and the calls of our layers."""
    result = root / f"result-{fused}.json"
    # NOTE: a folder of its own: beside it here lies tests/triton, which would hide triton.
    plugin = root / "plugin"
    plugin.mkdir(exist_ok=True)
    shutil.copy(__file__, plugin)
    here = Path(__file__).resolve().parents[1]
    paths = [str(plugin), str(here), os.environ.get("PYTHONPATH", "")]
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    env = {
        **os.environ, **dict.fromkeys(offline, "1"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths), _RESULT: str(result), _FUSED: str(int(fused)),
    }  # fmt: skip
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short", "-p", "peft_suite"]
    cases = ["tests/test_custom_models.py", "-k", selection]
    subprocess.run([sys.executable, "-m", "pytest", *options, *cases], cwd=root, env=env)
    counts: dict[str, dict[str, int]] = json.loads(result.read_text())
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default=SELECTION, help="pytest selection (default: all LoRA cases)")
    parser.add_argument("--min-fused-calls", type=int, default=MIN_FUSED_CALLS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = fetch_tests(Path(folder))
        stock, fused = (run(root, on, args.k) for on in (False, True))
    print(f"peft {version('peft')}, stock: {stock['outcomes']}")
    print(f"peft {version('peft')}, fused: {fused['outcomes']}")
    for call, count in Counter(fused["calls"]).most_common():
        print(f"    {count:6} calls {call}")
    same = stock["outcomes"] == fused["outcomes"] and "failed" not in fused["outcomes"]
    return 0 if same and fused["calls"].get("fused", 0) >= args.min_fused_calls else 1


if __name__ == "__main__":
    sys.exit(main())
