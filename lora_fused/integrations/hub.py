"""lora_fused as a kernel of the Hugging Face hub: `python -m lora_fused.integrations.hub DIR`.

    DIR/build.toml  DIR/CARD.md
    DIR/build/torch-cpu/  DIR/build/torch-cuda/     metadata.json, __init__.py, layers.py, …

What `kernels` loads must not be importable by name, so the library is copied with relative imports,
with operators of a namespace of its own (an installed lora_fused may be loaded beside it), and with
no imports but torch's and Python's. Load it from DIR with get_local_kernel, or by

    layer = LocalLayerRepository(DIR, layer_name="LoraLinear")
    replace_kernel_forward_from_hub(peft.tuners.lora.layer.Linear, "LoraLinear")
    with use_kernel_mapping({"LoraLinear": {"cpu": layer, "cuda": layer}}):
        kernelize(model, mode=Mode.TRAINING, device="cpu")
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import lora_fused

NAME, VERSION, BACKENDS = "lora-fused", 1, ("cpu", "cuda")
OLDEST_KERNELS = "0.17.0"
_SOURCE = Path(lora_fused.__file__).parent
_LEFT_OUT = {"testing.py", "doctor.py", "__main__.py"}  # no other module needs them
_INTEGRATIONS = ("guards.py", "peft_guards.py", "peft_call.py")
_ALLOWED = {"torch", "triton", *sys.stdlib_module_names}

_CACHE_HOME = '''"""The user's cache directory, by the environment alone."""

import os
from pathlib import Path


def user_cache_dir(name: str, appauthor: bool = False) -> str:
    """The folder for cached files of an application."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return str(Path(home or Path.home() / ".cache") / name)
'''

_BUILD = f"""[general]
edition = 5
name = "{NAME}"
version = {VERSION}
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
"""

_CARD = f"""---
library_name: kernels
license: apache-2.0
---
# {NAME}

The LoRA linear layer y = x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ + bias, forward and backward, fused.

* `layers.LoraLinear` for `peft.tuners.lora.layer.Linear` (training, torch.compile);
* `lora_linear`, `lora_linear_group`, `FusedLoRALinear`, `explain`.

Native CPU kernels are included for the Python they were built for ({{native}}); elsewhere torch's
GEMM serves every call, and `explain` says so.
"""


def write_kernel(folder: Path) -> Path:
    """Write the layout of a hub kernel into a folder, replacing what a former call wrote there.

    Returns the folder. Raises ValueError for a source file that imports what a kernel may not.
    """
    files = dict(_files())
    key = hashlib.sha256("".join(f"{n}{t}" for n, t in sorted(files.items())).encode())
    for backend in BACKENDS:
        ident = f"lora_fused_{backend}_{key.hexdigest()[:12]}"
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for name, text in files.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_text(text.replace(_NAMESPACE, ident), encoding="utf-8")
        for file in (*_native(), *_data()):
            (variant / file.relative_to(_SOURCE)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, variant / file.relative_to(_SOURCE))
        text = json.dumps(_metadata(ident, backend), indent=2)
        (variant / "metadata.json").write_text(text + "\n", encoding="utf-8")
    (folder / "build.toml").write_text(_BUILD, encoding="utf-8")
    native = ", ".join(library.name for library in _native()) or "none in this copy"
    (folder / "CARD.md").write_text(_CARD.format(native=native), encoding="utf-8")
    return folder


_NAMESPACE = "_LORA_FUSED_NAMESPACE_"


def _files() -> Iterator[tuple[str, str]]:
    """Relative path and text of every file of the kernel's package."""
    top = [path for path in _SOURCE.glob("*.py") if path.name not in _LEFT_OUT]
    some = [_SOURCE / "integrations" / name for name in ("__init__.py", *_INTEGRATIONS)]
    for path in (*top, *some, *(_SOURCE / "backends").rglob("*.py")):
        name = path.relative_to(_SOURCE).as_posix()
        yield name, relocated(path.read_text(encoding="utf-8"), name)
    layer = (_SOURCE / "integrations" / "hub_layer.py").read_text(encoding="utf-8")
    yield "layers.py", relocated(layer, "layers.py")
    yield "cache_home.py", _CACHE_HOME
    init = relocated((_SOURCE / "__init__.py").read_text(encoding="utf-8"), "__init__.py")
    yield "__init__.py", init + '\nfrom . import layers\n\n__all__ += ["layers"]\n'


def relocated(text: str, name: str) -> str:
    """A source file of lora_fused with relative imports and a namespace of operators to fill in.

    name: its path below the package. Raises ValueError for an import that a kernel may not have.
    """
    if re.search(r"import_module\(f?.lora_fused", text):
        raise ValueError(f"{name}: import_module needs a relative name to be loaded from the hub.")
    lines = text.split("\n")
    up = "." * (name.count("/") + 1)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            root, _, rest = node.module.partition(".")
            _check(root, name)
            if root == "lora_fused":
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = line.replace(
                    f"from {node.module} ", f"from {up}{rest} ", 1
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "platformdirs":
                    line = lines[node.lineno - 1]
                    own = f"from {up} import cache_home as platformdirs"
                    lines[node.lineno - 1] = line.replace("import platformdirs", own)
                elif alias.name.split(".")[0] == "lora_fused":
                    raise ValueError(f"{name}: write `from lora_fused import …`, not `import`.")
                else:
                    _check(alias.name.split(".")[0], name)
    text = "\n".join(lines).replace("lora_fused::", f"{_NAMESPACE}::")
    return re.sub(r"\btorch\.ops\.lora_fused\b", f"torch.ops.{_NAMESPACE}", text)


def _check(root: str, name: str) -> None:
    if root not in _ALLOWED and root != "lora_fused":
        raise ValueError(f"{name} imports {root}, expected torch, triton or the standard library.")


def _native() -> list[Path]:
    return sorted(_SOURCE.glob("_C*.so")) + sorted(_SOURCE.glob("_C*.pyd"))


def _data() -> list[Path]:
    """What lies beside the backends' modules and is not Python."""
    files = (path for path in (_SOURCE / "backends").rglob("*") if path.is_file())
    return [path for path in files if path.suffix not in (".py", ".pyc")]


def _metadata(ident: str, backend: str) -> dict[str, object]:
    return {
        "id": ident, "name": NAME, "version": VERSION, "license": "Apache-2.0",
        "kernels-minver": OLDEST_KERNELS, "python-depends": [], "backend": {"type": backend},
    }  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the kernel")
    folder = write_kernel(parser.parse_args().folder)
    print(f"{folder}: a kernel for {', '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
