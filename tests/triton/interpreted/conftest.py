"""These tests run in a process of their own, which test_interpreted.py starts."""

from __future__ import annotations

from lora_fused.backends.triton.launch import interpreted

collect_ignore_glob = [] if interpreted() else ["test_*.py"]

if interpreted():
    from tests.ptx_emulator.kernels.interpret import mend_bf16

    mend_bf16()
