"""A GPU made of this machine's CPU: launchers on a fake runtime, kernels in the emulator.

    with EmulatedGpu() as gpu:            # lora_fused.backends.cuda now takes CPU tensors
        s = cuda.shrink(route, x, a, 2.0)
    gpu.launches                          # what was launched, with the emulator's reports

Everything between the backend's Python and the PTX that ships is the product's own: tensor
metadata, workspaces, the launchers' choice of kernel, grid, shared memory and arguments.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fused.backends import cuda, cuda_native, cuda_sm80, cuda_sm90
from tests.ptx_emulator import TOGETHER, Offset, Report, Schedule, Struct, Uninitialised, run
from tests.ptx_emulator.layouts import Swizzle
from tests.ptx_emulator.tensor_map import encode_tiled

from . import sm80, sm90
from .compile import ROOT, _module, ptx

BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
SOURCES = {
    "lora_shrink_": "csrc/cuda/shrink.cu",
    "lora_reduce_": "csrc/cuda/reduce.cu",
    "lora_decode_": "csrc/cuda/decode.cu",
}
STREAM = 7
SMALL = {
    "major": 8, "minor": 0, "sms": 4, "shared_bytes_per_block": 166912,
    "shared_bytes_per_sm": 167936, "registers_per_sm": 65536, "threads_per_sm": 2048,
    "l2_bytes": 1 << 20,
}  # fmt: skip


@cache
def fake_module() -> ModuleType:
    """lora_fused._C.cuda on the fake runtime, linked from the objects of the native build."""
    ninja = BUILD / "build.ninja"
    if not ninja.exists() or "fake_cuda" not in ninja.read_text():
        pytest.skip("the native module was not built with its CUDA part from this checkout")
    command = ["cmake", "--build", str(BUILD), "--target", "fake_cuda"]
    with (BUILD / "fake_cuda.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side: one builds
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (BUILD / "fake").glob("fake_cuda*.so")
    spec = importlib.util.spec_from_file_location("fake_cuda", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Launch:
    """One kernel launch: what the runtime was told, and what the emulator says."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    told: dict[str, str]
    report: Report | None = None


@dataclass
class _Memory(TorchDispatchMode):
    """Every storage that torch makes or sees, as the emulator's buffers."""

    arrays: dict[int, np.ndarray] = field(default_factory=dict)
    unwritten: set[int] = field(default_factory=set)
    owners: list[torch.UntypedStorage] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            fresh = func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
            self.add(out, unwritten=fresh)
        return out

    def add(self, tensor: torch.Tensor, unwritten: bool = False) -> None:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start in self.arrays or storage.nbytes() == 0:
            return
        view = (ctypes.c_uint8 * storage.nbytes()).from_address(start)
        self.arrays[start] = np.frombuffer(view, np.uint8)
        self.owners.append(storage)
        if unwritten:
            self.unwritten.add(start)

    def field_of(self, word: int) -> Any:
        """A pointer into known memory, or the word itself."""
        for start, array in self.arrays.items():
            if start <= word < start + len(array):
                buffer = Uninitialised(array) if start in self.unwritten else array
                return Offset(buffer, word - start)
        return np.uint64(word)

    def touched(self, fields: list[Any]) -> None:
        """What a kernel was given counts as written from now on."""
        for pointer in fields:
            if isinstance(pointer, Offset) and isinstance(pointer.array, Uninitialised):
                self.unwritten -= {k for k, a in self.arrays.items() if a is pointer.array.array}


_ELEMENTS = {6: "f16", 7: "f32", 9: "bf16"}  # CUtensorMapDataType
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle, bytes


def _tensor_map(asked: dict[str, Any]) -> bytes:
    """What the emulator takes for the 128 bytes of the driver."""
    return encode_tiled(
        _ELEMENTS[asked["dtype"]], asked["address"], asked["size"], asked["stride_bytes"],
        asked["box"], asked["element_stride"], asked["interleave"],
        Swizzle(_SWIZZLES[asked["swizzle"]]), bool(asked["fill"]),
    )  # fmt: skip


class EmulatedGpu:
    """Replaces the native module and the place of tensors while it is entered."""

    def __init__(
        self,
        arch: str = "sm_80",
        schedule: Schedule = TOGETHER,
        resident: int = 64,
        counters: bool = False,
        device: dict[str, int] | None = None,
        edit: Any = None,
    ) -> None:
        self.arch, self.edit = arch, edit
        self.options = {"schedule": schedule, "resident": resident, "counters": counters}
        self.device = {**SMALL, "major": int(arch[3:].rstrip("a")) // 10, **(device or {})}
        self.launches: list[Launch] = []
        self.memory = _Memory()
        self.patch = pytest.MonkeyPatch()
        self.stream = STREAM
        self.replayable: list[tuple[dict[str, str], list[Any]]] = []

    def __enter__(self) -> EmulatedGpu:
        module = fake_module()
        module.control.reset([self.device, self.device])
        module.control.on_launch(self._launch)
        module.control.on_tensor_map(_tensor_map)
        for where in (cuda, cuda_native, cuda_sm80, cuda_sm90):
            self.patch.setattr(where, "native", lambda: module)
            self.patch.setattr(where, "place_of", self.place_of)
        self.patch.setattr(cuda_native, "_words", {})
        self.patch.setattr(cuda_native, "_captured", {})
        self.memory.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.memory.__exit__(*error)
        self.patch.undo()
        fake_module().control.reset([])

    def place_of(self, t: torch.Tensor) -> cuda_native.Place:
        return cuda_native.Place(t.device, 0, self.stream)

    def see(self, *tensors: torch.Tensor | None) -> None:
        """Tensors made outside that kernels will read."""
        for tensor in tensors:
            if tensor is not None:
                self.memory.add(tensor)

    def text_of(self, kernel: str) -> str:
        """The PTX with this kernel."""
        if kernel.startswith("lora_matmul_sm90_"):
            text = sm90.kernel_text(kernel)
            return text if self.edit is None else self.edit(kernel, text)
        if kernel.startswith("lora_matmul_sm80_"):
            text = sm80.kernel_text(sm80.variant(kernel), self.arch)
            return text if self.edit is None else self.edit(kernel, text)
        source = next(path for prefix, path in SOURCES.items() if kernel.startswith(prefix))
        text = ptx(source, self.arch)
        return text if self.edit is None else self.edit(kernel, text)

    def _launch(self, told: dict[str, str], address: int) -> None:
        (parameter,) = _module(self.text_of(told["kernel"])).kernel(told["kernel"]).params
        words = np.frombuffer(ctypes.string_at(address, parameter.size), np.uint64)
        fields = [self.memory.field_of(int(word)) for word in words]
        self.replayable.append((told, fields))
        self.replay(self.replayable[-1])

    def replay(self, recorded: tuple[dict[str, str], list[Any]]) -> None:
        """A launch with the arguments it had when it was recorded, as a graph would."""
        told, fields = recorded
        grid, block = (tuple(map(int, told[key].split(","))) for key in ("grid", "block"))
        launch = Launch(told["kernel"], grid, block, int(told["shared"]), told)
        self.launches.append(launch)
        launch.report = run(
            _module(self.text_of(launch.kernel)), launch.kernel, grid, block, [Struct(*fields)],
            cluster=int(told.get("cluster", "1").split(",")[0]), shared=launch.shared,
            **self.options,
        )  # fmt: skip
        self.memory.touched(fields)

    def check(self) -> None:
        """No finding in any launch, and every workspace word as it was."""
        assert self.launches
        for launch in self.launches:
            assert launch.report is not None
            launch.report.check()
        for _, words in (*cuda_native._words.values(), *cuda_native._captured.values()):
            assert not words.any()
