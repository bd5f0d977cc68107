"""The build of the CUDA part: settings, targets, a compiler that fails, the wheels' list."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .compile import ROOT, toolkit


def configure(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """CMake's configuration of this checkout in a folder of its own."""
    import pybind11

    command = [
        "cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if "CUDA" not in k and "NVCC" not in k}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**clean, **environment}
    )


def flags(tmp_path: Path, source: str) -> set[str]:
    """The -gencode targets of a source in the generated build."""
    ninja = (tmp_path / "build" / "build.ninja").read_text()
    line = next(l for l in ninja.splitlines() if "nvcc -c" in l and f"{source} " in f"{l} ")
    return set(re.findall(r",code=(\w+)", line))


@pytest.mark.parametrize(
    ("wanted", "everywhere", "hopper", "mma"),
    [
        ("8.0;9.0a", {"sm_80", "sm_90a"}, {"sm_90a"}, {"sm_80"}),
        ("8.0 9.0+PTX", {"sm_80", "sm_90", "compute_90"}, {"sm_90a"}, {"sm_80", "compute_90"}),
        ("5.2 8.6", {"sm_86"}, None, {"sm_86"}),
        ("8.9,12.0+PTX", {"sm_89", "sm_120", "compute_120"}, None,
         {"sm_89", "sm_120", "compute_120"}),
        ("9.0a 10.0", {"sm_90a", "sm_100"}, {"sm_90a"}, {"compute_80"}),
        ("all", {"sm_80", "sm_86", "sm_89", "sm_90a", "compute_90", "sm_100", "sm_120"},
         {"sm_90a"}, {"sm_80", "sm_86", "sm_89", "compute_90", "sm_120"}),
    ],
)  # fmt: skip
def test_targets(
    tmp_path: Path, wanted: str, everywhere: set[str], hopper: set[str] | None, mma: set[str]
) -> None:
    """mma.sync is not the fast path of sm_90 and sm_100, and its matmul is not built for them."""
    done = configure(
        tmp_path, LORA_FUSED_CUDA_ARCH_LIST=wanted, LORA_FUSED_NVCC=str(toolkit().nvcc)
    )
    assert done.returncode == 0, done.stderr
    assert flags(tmp_path, "csrc/cuda/shrink.cu") == everywhere
    assert flags(tmp_path, "csrc/cuda/sm80/matmul_bf16.cu") == mma
    if hopper is None:
        with pytest.raises(StopIteration):
            flags(tmp_path, "csrc/cuda/sm90/matmul.cu")
    else:
        assert flags(tmp_path, "csrc/cuda/sm90/matmul.cu") == hopper


def test_a_wrong_target_says_what_is_expected(tmp_path: Path) -> None:
    done = configure(tmp_path, TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode != 0
    assert "got Hopper, expected targets like 8.0, 9.0a or 12.0+PTX" in " ".join(
        done.stderr.split()
    )


def test_off_leaves_cuda_out(tmp_path: Path) -> None:
    assert configure(tmp_path, LORA_FUSED_CUDA="OFF").returncode == 0
    assert "nvcc" not in (tmp_path / "build" / "build.ninja").read_text()


def test_a_failing_cuda_build_leaves_the_cpu_kernels(monkeypatch, tmp_path: Path) -> None:
    """setup.py builds again without CUDA, unless CUDA was asked for."""
    tried: list[str] = []
    command = load_setup(monkeypatch)

    def build(self, output_dir: Path, cuda: str) -> None:
        tried.append(cuda)
        if cuda != "OFF":
            raise subprocess.CalledProcessError(1, "nvcc")

    monkeypatch.setattr(command, "configure_and_build", build)
    builder = command.__new__(command)
    monkeypatch.delenv("LORA_FUSED_CUDA", raising=False)
    builder.build_with_cuda_or_without(tmp_path)
    assert tried == ["AUTO", "OFF"]
    monkeypatch.setenv("LORA_FUSED_CUDA", "ON")
    with pytest.raises(subprocess.CalledProcessError):
        builder.build_with_cuda_or_without(tmp_path)


def load_setup(monkeypatch):
    """The build command of setup.py, without running a setup."""
    import runpy

    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"]


def test_the_makefile_and_the_extra_name_the_same_wheels() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"cuda-build = \[(.*?)\]", project, re.S)
    makefile = re.search(r"^NVCC_WHEELS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert extra and makefile
    assert sorted(re.findall(r'"([\w-]+)"', extra[1])) == sorted(makefile[1].split())
