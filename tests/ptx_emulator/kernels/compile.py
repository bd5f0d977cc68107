"""Compiles the kernels of this folder to PTX: `python -m tests.ptx_emulator.kernels.compile DIR`.

Needs nvcc for the .cu files and Triton for the others, but no GPU; what is missing is skipped.
Debug sections are dropped, `.loc` lines stay.  The fixtures in `ptx/` were made like this.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CUDA = {
    "tile_gemm": "sm_80",
    "hopper_gemm": "sm_90a",
    "blocks": "sm_80",
    "arithmetic": "sm_90",
}
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}


def stripped(text: str) -> str:
    """Without debug sections, comments of the compiler and blank lines."""
    text = re.sub(r"\n\s*\.section\b.*", "\n", text, flags=re.S)
    text = re.sub(r"[ \t]*//[^\n]*", "", text)
    text = re.sub(r"(\.loc\s+\d+ \d+ \d+), function_name[^\n]*", r"\1", text)
    text = re.sub(r"\.file\s+(\d+)\s+\"[^\"]*/", r'.file \1 "', text)
    labels = set(re.findall(r"(?:bra|bra\.uni)\s+([$\w]+)", text))
    labels |= set(re.findall(r"[$\w]+", " ".join(re.findall(r"\.branchtargets([^;]*);", text))))
    lines = []
    for line in text.splitlines():
        label = re.fullmatch(r"(\$L__tmp\d+):\s*", line)
        if line.strip() and not (label and label[1] not in labels):
            lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def compile_cuda(out: Path, nvcc: str) -> None:
    for name, target in CUDA.items():
        command = [nvcc, "-std=c++17", f"-arch={target}", "-lineinfo", "-ptx"]
        target_file = out / f"{name}.ptx"
        subprocess.run([*command, str(HERE / f"{name}.cu"), "-o", str(target_file)], check=True)
        target_file.write_text(stripped(target_file.read_text()))


def triton_kernels():
    """(file name, kernel, argument types, constants, capability, warps, stages)."""
    from . import triton_kernels as k

    lora = {
        "x": "*T",
        "w": "*T",
        "a": "*T",
        "b": "*T",
        "y": "*T",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "scaling": "fp32",
    }
    for capability in (80, 86, 89, 90, 100, 120):
        yield f"lora_bf16_{capability}", k.lora_kernel, lora, TILE | {"R": 16}, capability, 4, 3
    for kind in ("fp16", "fp32"):
        for capability in (80, 90, 100):
            yield (
                f"lora_{kind}_{capability}",
                k.lora_kernel,
                lora,
                TILE | {"R": 16},
                capability,
                4,
                2,
            )
    pointers = {"x_ptr": "*T", "w_ptr": "*T", "y_ptr": "*T", "M": "i32", "N": "i32", "K": "i32"}
    for capability in (80, 90, 100, 120):
        yield f"descriptor_bf16_{capability}", k.descriptor_kernel, pointers, TILE, capability, 4, 3
    for capability, lora_term in ((90, True), (100, False), (120, False)):
        m, n, k_ = 64, 64, 32
        shapes = {"x": (m, k_), "w": (n, k_), "a": (16, k_), "b": (n, 16), "y": (m, n)}
        maps = {n: f"tensordesc<bf16[{h}, {w}]>" for n, (h, w) in shapes.items()} | {"K": "i32"}
        tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k_, "LORA": lora_term}
        yield (f"specialised_bf16_{capability}", k.specialised_kernel, maps, tile, capability, 4, 3)
    small = {"BLOCK_M": 64, "BLOCK_K": 64, "R": 16}
    gradient = {"x": "*T", "ds": "*T", "out": "*fp32", "M": "i32", "K": "i32"}
    for capability in (80, 90):
        yield f"gradient_bf16_{capability}", k.gradient_kernel, gradient, small, capability, 4, 2
        yield (
            f"softmax_bf16_{capability + 10}",
            k.softmax_kernel,
            {"x": "*T", "y": "*T", "N": "i32"},
            {"BLOCK": 512},
            capability + 10,
            4,
            2,
        )
    dropout = {"x": "*T", "y": "*T", "seed": "i32", "n": "i32", "p": "fp32"}
    yield "dropout_fp32_80", k.dropout_kernel, dropout, {"BLOCK": 512}, 80, 4, 2


def compile_triton(out: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, fn, types, constants, capability, warps, stages in triton_kernels():
        kind = name.split("_")[1]
        signature = {n: types.get(n, "constexpr").replace("*T", f"*{kind}") for n in fn.arg_names}
        aligned = [n for n in fn.arg_names if signature[n].startswith("*") or n in ("K", "N")]
        attributes = {
            (fn.arg_names.index(n),): [["tt.divisibility", 16]]
            for n in aligned
            if n in types and "tensordesc" not in types[n]
        }
        source = ASTSource(
            fn,
            signature,
            constexprs={(fn.arg_names.index(n),): v for n, v in constants.items()},
            attrs=attributes,
        )
        options = {"num_warps": warps, "num_stages": stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        header = f"// shared {compiled.metadata.shared} warps {compiled.metadata.num_warps}\n"
        (out / f"{name}.ptx").write_text(header + stripped(compiled.asm["ptx"]))


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    nvcc = shutil.which("nvcc")
    if nvcc:
        compile_cuda(out, nvcc)
    try:
        import triton  # noqa: F401
    except ImportError:
        return
    compile_triton(out)


if __name__ == "__main__":
    main()
