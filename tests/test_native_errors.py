"""What the native module refuses, in which words, and which instruction set is used."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fused.backends import cpu
from tests.native import ISAS, module, needs_native, raw_matmul

pytestmark = needs_native
ROOT = Path(__file__).resolve().parent.parent

# Arguments of calls on empty problems: whatever gets through touches no memory.
VALID: dict[str, dict[str, Any]] = {
    "matmul": dict(isa="", dtype=0, M=0, N=0, K=0, R=0, x=0, x_sm=0, x_sk=1, w=0, w_sk=0, w_sn=1,
                   packed=0, s=0, s_sm=0, l=0, l_sr=0, l_sn=1, bias=0, accumulate=False, seed=0,
                   threshold=0, y=0, y_sm=0, threads=1),
    "packed_bytes": dict(isa="", dtype=0, K=0, N=0),
    "pack": dict(isa="", dtype=0, K=0, N=0, w=0, w_sk=0, w_sn=1, out=0, threads=1),
    "shrink": dict(isa="", dtype=0, M=0, K=0, R=0, x=0, x_sm=0, x_sk=1, a=0, a_sr=0, a_sk=1,
                   scale=1.0, seed=0, threshold=0, s=0, threads=1),
    "shrink_reduce": dict(isa="", dtype=0, M=0, N=0, R=0, dy=0, dy_sm=0, dy_sn=1, b=0, b_sn=0,
                          b_sr=1, scale=1.0, ds=0, s=0, db=0, db_dtype=0, db_sn=0, db_sr=1,
                          threads=1),
    "reduce": dict(isa="", dtype=0, M=0, K=0, R=0, ds=0, x=0, x_sm=0, x_sk=1, seed=0, threshold=0,
                   da=0, da_dtype=0, da_sr=0, da_sk=1, threads=1),
    "keep_mask": dict(isa="", seed=0, threshold=0, M=0, K=0, out=0),
}  # fmt: skip

DTYPE_SENTENCE = "dtype: got code {}, expected 0 (fp32), 1 (bf16) or 2 (fp16)"
BAD: dict[str, list[tuple[Any, str]]] = {
    "isa": [(name, f"isa: got '{name}', expected one that this CPU runs: {', '.join(ISAS)}")
            for name in ("", "sse2", "AVX2")],
    **{name: [(code, DTYPE_SENTENCE.format(code)) for code in (-1, 3)]
       for name in ("dtype", "db_dtype", "da_dtype")},
    **{name: [(-1, "sizes: got a negative one, expected all >= 0")] for name in "MNKR"},
    "threads": [(n, f"threads: got {n}, expected at least 1") for n in (0, -2)],
    "threshold": [(n, f"threshold: got {n}, expected 0 to 65536") for n in (-1, 65537, 1 << 33)],
}  # fmt: skip


def call(entry: str, **changed: Any) -> None:
    getattr(module(), entry)(*{**VALID[entry], "isa": ISAS[-1], **changed}.values())


@pytest.mark.parametrize("entry", VALID)
def test_empty_problems_are_fine(entry: str) -> None:
    call(entry)


@pytest.mark.parametrize(
    "entry, argument",
    [(entry, argument) for entry in VALID for argument in BAD if argument in VALID[entry]],
)
def test_bad_arguments_are_refused_in_one_sentence(entry: str, argument: str) -> None:
    for value, sentence in BAD[argument]:
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            call(entry, **{argument: value})


def test_wrong_types_and_counts_are_refused() -> None:
    for arguments in ((), (ISAS[0], 0, 1), (ISAS[0], "0", 1, 1), (ISAS[0], 0, 1.5, 1)):
        with pytest.raises(TypeError):
            module().packed_bytes(*arguments)


@pytest.mark.parametrize("isa", ISAS)
def test_too_little_memory_is_an_exception(isa: str) -> None:
    """No machine has the scratch memory that 2⁴⁶ steps of contraction would need."""
    x = torch.ones(1, 1).expand(40, 1 << 46)
    with pytest.raises(MemoryError):
        raw_matmul(isa, x, x[:1].t().expand(-1, 100), None, None, torch.empty(40, 100))


def test_supported_is_a_prefix_of_compiled_in_ascending_order() -> None:
    order = ["avx2", "avx512", "avx512_bf16", "amx_bf16"]
    compiled = module().compiled_isas()
    assert compiled == [isa for isa in order if isa in compiled]
    assert [isa for isa in compiled if isa in ISAS] == ISAS
    assert set(ISAS) <= set(module().cpu_info()["flags"])


def test_cpu_info_agrees_with_the_kernel() -> None:
    facts = module().cpu_info()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        pytest.skip("there is no /proc/cpuinfo here")
    says = dict(re.findall(r"^(.*?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    assert facts["vendor"] == says["vendor_id"]
    assert (facts["family"], facts["model"]) == (int(says["cpu family"]), int(says["model"]))
    assert facts["brand"].strip("\0 ") == says["model name"].strip()
    flags = set(says["flags"].split())
    for flag in ("avx2", "avx512_bf16", "avx512_fp16"):
        assert (flag in facts["flags"]) == (flag in flags)


def fresh_isa(monkeypatch: pytest.MonkeyPatch, forced: str) -> str:
    monkeypatch.setenv("LORA_FUSED_CPU_ISA", forced)
    monkeypatch.setattr(cpu, "isa", functools.cache(cpu.isa.__wrapped__))
    return cpu.isa()


def test_the_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ISAS:
        assert fresh_isa(monkeypatch, isa) == isa
    assert fresh_isa(monkeypatch, "") == ISAS[-1]


def test_an_unknown_instruction_set_is_refused_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sentence = f"LORA_FUSED_CPU_ISA is 'sse9', expected one of {', '.join(ISAS)}."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        fresh_isa(monkeypatch, "sse9")
    code = "import torch, lora_fused; print('imported'); lora_fused.FusedLoRALinear(8, 8)({})"
    ran = subprocess.run(
        [sys.executable, "-c", code.format("torch.ones(2, 8)")],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "LORA_FUSED_CPU_ISA": "sse9"},
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stdout.strip() == "imported"
    assert ran.stderr.strip().endswith(f"ValueError: {sentence}")


def leaking_symbols(objects: list[Path], isa: str) -> list[str]:
    """Functions and data that the linker may give to code outside of this instruction set."""
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--demangle", *map(str, objects)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    symbols = re.findall(r"^[0-9a-f]+ [A-Zuvw] (.*)$", listing, re.MULTILINE)
    assert symbols, "no symbols at all: the files are not what this test takes them for"
    return [name for name in symbols if f"lora_fused::{isa}::" not in name]


@pytest.mark.skipif(not shutil.which("nm"), reason="binutils (nm) is not installed")
@pytest.mark.parametrize("isa", module().compiled_isas() if ISAS else [])
def test_no_function_leaks_out_of_its_instruction_set(isa: str) -> None:
    """An inline function outside of the namespaces is emitted once per instruction set.

    The linker keeps any one of the copies, and a CPU without AVX-512 would run it.
    """
    objects = sorted(ROOT.glob(f"build/**/kernels_{isa}.dir/**/*.o"))
    if not objects:
        pytest.skip("the build directory with the object files is gone")
    assert leaking_symbols(objects, isa) == []
    other = next(name for name in module().compiled_isas() if name != isa)
    assert leaking_symbols(objects, other), "this test cannot fail"
