"""How fast the emulator is: `python -m tests.ptx_emulator.speed`.

CPU seconds of one bf16 matrix product without counters, the least of three runs: nvcc's and
Triton's kernel for sm_80. The goals are 1 s for 256³ and 4 s for 512³.
"""

from __future__ import annotations

import time

from .cases import Case

KERNELS = ("tile_gemm", "lora_bf16_80", "lora_bf16_90")


def seconds(case: Case) -> float:
    start = time.process_time()
    case.run().report.check()
    return time.process_time() - start


def main() -> None:
    for size in (256, 512):
        for name in KERNELS:
            case = Case(name, {"M": size, "N": size, "K": size})
            print(f"{name:16} {size}³  {min(seconds(case) for _ in range(3)):.2f} s")


if __name__ == "__main__":
    main()
