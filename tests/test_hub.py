"""lora_fused as a kernel of the Hugging Face hub, loaded from a local folder by `kernels`."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from lora_fused.integrations import hub

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "lora_fused.integrations.hub", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def test_layout(kernel: Path) -> None:
    assert {path.name for path in kernel.iterdir()} == {"build", "build.toml", "CARD.md"}
    variants = {path.name: path for path in (kernel / "build").iterdir()}
    assert variants.keys() == {"torch-cpu", "torch-cuda"}
    for path in variants.values():
        metadata = json.loads((path / "metadata.json").read_text())
        assert metadata["id"].startswith("lora_fused_")
        assert {"__init__.py", "layers.py", "ops.py"} <= {file.name for file in path.iterdir()}


def test_what_kernels_says_of_it(kernel: Path) -> None:
    rust = pytest.importorskip("kernels._rust")
    assert rust.Build.open(kernel).general.backends == [rust.Backend.CPU, rust.Backend.CUDA]
    for name, backend in (("cpu", rust.Backend.CPU), ("cuda", rust.Backend.CUDA)):
        metadata = rust.Metadata.read_from_file(kernel / "build" / f"torch-{name}/metadata.json")
        assert metadata.backend.backend_type == backend and metadata.python_depends == []


def test_nothing_is_imported_by_an_absolute_name(kernel: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    files = list((kernel / "build" / "torch-cpu").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        text = path.read_text()
        assert "lora_fused::" not in text and not re.search(r"torch\.ops\.lora_fused\b", text)
        assert 'Library("lora_fused"' not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path


def test_other_imports_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x\.py imports numpy, expected torch, triton"):
        hub.relocated("import numpy", "x.py")
    with pytest.raises(ValueError, match=r"x\.py imports scipy"):
        hub.relocated("from scipy.linalg import svd", "x.py")
    with pytest.raises(ValueError, match="import_module needs a relative name"):
        hub.relocated('importlib.import_module(f"lora_fused.{name}")', "x.py")
    with pytest.raises(ValueError, match="write `from lora_fused import"):
        hub.relocated("import lora_fused.group", "x.py")


def test_relocated() -> None:
    text = "from lora_fused.a.b import c\nfrom lora_fused import d\nop = 'lora_fused::e'"
    assert hub.relocated(text, "backends/x.py").splitlines()[:2] == [
        "from ..a.b import c", "from .. import d",
    ]  # fmt: skip
    assert "lora_fused::" not in hub.relocated(text, "x.py")


def test_written_again(kernel: Path) -> None:
    stale = kernel / "build" / "torch-cpu" / "stale.py"
    before = (kernel / "build" / "torch-cpu" / "metadata.json").read_text()
    stale.touch()
    hub.write_kernel(kernel)
    assert not stale.exists()
    assert (kernel / "build" / "torch-cpu" / "metadata.json").read_text() == before


def test_kernelize(kernel: Path) -> None:
    pytest.importorskip("kernels")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hub_check", str(kernel)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fused calls: 147" in done.stdout
