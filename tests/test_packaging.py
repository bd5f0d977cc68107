"""The package as others get it: metadata, importing, the wheel and the sdist, no compiler."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

import lora_fused
from tests.conftest import native_isas

ROOT = Path(__file__).resolve().parent.parent
SUBPACKAGES = {
    ".".join(init.parent.relative_to(ROOT).parts)
    for init in (ROOT / "lora_fused").rglob("__init__.py")
}


def run(*command: str, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed; it requires no native kernels."""
    inherited = {k: v for k, v in os.environ.items() if k != "LORA_FUSED_REQUIRE_NATIVE"}
    ran = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def run_python(code: str, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-c", textwrap.dedent(code), cwd=cwd, **environment)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_metadata(project: dict[str, Any]) -> None:
    assert project["version"] == lora_fused.__version__
    required = {re.split(r"[<>=!~ ]", line)[0]: line for line in project["dependencies"]}
    assert required["torch"] == "torch>=2.8", "any torch from 2.8 on: no pin"
    assert "triton" not in required, "torch brings the triton that fits it"


@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils")
def test_the_wheel_takes_every_subpackage() -> None:
    tomllib, setuptools = pytest.importorskip("tomllib"), pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = setuptools.find_packages(ROOT, **settings["tool"]["setuptools"]["packages"]["find"])
    assert set(found) == SUBPACKAGES and len(SUBPACKAGES) > 1


def test_importing_uses_no_gpu_times_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = """
        import os, torch

        def forbidden(*_, **__):
            raise AssertionError("importing lora_fused must not do this")

        torch.cuda.init = torch.cuda._lazy_init = torch.cuda.is_available = forbidden
        os.makedirs = os.mkdir = forbidden
        import lora_fused
        from lora_fused import autotune

        assert not autotune._known
        print(lora_fused.__version__)
    """
    home = {
        name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "LORA_FUSED_CACHE_DIR")
    }
    printed = run_python(code, tmp_path, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1", **home)
    assert printed.strip() == lora_fused.__version__
    assert list(tmp_path.rglob("*")) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources without anything that was built."""
    needed = [p for p in ("pip", "setuptools", "pybind11") if not importlib.util.find_spec(p)]
    if needed:
        pytest.skip(f"an install without build isolation needs {', '.join(needed)}")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored))


def pip_install(what: Path, site: Path, **environment: str) -> None:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(
        sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(what),
        cwd=site.parent, **environment,
    )  # fmt: skip


USE_A_LAYER = """
    import sys

    # An editable install of the checkout would offer its own modules for those that are missing.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
    import torch, lora_fused
    from lora_fused.testing import check_case, make_case

    print(lora_fused.__file__)
    layer = lora_fused.FusedLoRALinear(16, 8, r=4)
    layer(torch.randn(5, 16)).sum().backward()
    check_case(make_case(33, 70, 90, 4, torch.float32, bias=True, dropout_p=0.1))
    print(lora_fused.explain(layer))
"""


def use_a_layer(site: Path) -> str:
    # Without the site module: an editable install of the sources would lend its native module.
    path = [str(site), *(directory for directory in sys.path if "-packages" in directory)]
    code = textwrap.dedent(USE_A_LAYER)
    printed = run(
        sys.executable, "-S", "-c", code, cwd=site.parent, PYTHONPATH=os.pathsep.join(path)
    )
    assert printed.startswith(str(site)), printed
    return printed


def test_without_a_compiler_the_torch_backend_serves(tree: Path, tmp_path: Path) -> None:
    empty, site = tmp_path / "empty", tmp_path / "site"
    empty.mkdir()
    pip_install(tree, site, PATH=str(empty), CXX="/nonexistent/c++")
    assert not list(site.rglob("*.so"))
    printed = use_a_layer(site)
    assert "runs on  torch" in printed
    assert "cpu: the native kernels are not built" in printed


def test_a_failed_native_build_is_an_error_on_request(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"CalledProcessError|FileNotFoundError"):
        pip_install(tree, tmp_path / "site", CXX="/nonexistent/c++", LORA_FUSED_REQUIRE_NATIVE="1")


@pytest.mark.full
@pytest.mark.skipif(not native_isas(), reason="the native kernels are not built or cannot run")
def test_sdist_to_wheel_to_a_running_layer(tree: Path, tmp_path: Path) -> None:
    """The wheel is built from the sdist alone: neither lacks a file."""
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    sdist = tree / "dist" / run_python(code, tree).split()[-1]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*.[ch]*")}
    assert sources and sources | {"CMakeLists.txt", "LICENSE", "lora_fused/py.typed"} <= names
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
        "-w", str(tmp_path), str(sdist), cwd=tmp_path, LORA_FUSED_REQUIRE_NATIVE="1",
        LORA_FUSED_CUDA="OFF",  # minutes of compilation that this checkout's own build has had
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_fused").rglob("*.py")}
    assert modules <= packed and any(name.startswith("lora_fused/_C.") for name in packed)
    assert {name.partition("/")[0].partition("-")[0] for name in packed} == {"lora_fused"}
    site = tmp_path / "site"
    pip_install(wheel, site)
    assert f"cpu ({native_isas()[-1]}," in use_a_layer(site)
