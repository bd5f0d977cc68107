"""Runs the package's launches on CPU tensors: compiled for a GPU, executed by the PTX emulator.

`emulated("sm_90")` takes the place of the kernels that lora_fused.backends.triton launches, so that
the whole host side runs as it ships: grids, strides, workspaces, descriptors, autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fused.backends.triton import launch
from tests.ptx_emulator import Report, Schedule, TensorMap, Uninitialised, parse, run
from tests.triton.compiled import Compiled, Request, compile_kernel

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
}
_STORAGE = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}
_SWIZZLE_BYTES = (0, 32, 64, 128)


@dataclass
class Descriptor:
    """Stands for triton.tools.tensor_descriptor.TensorDescriptor."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]


@dataclass
class Launch:
    """One launch: how the kernel was specialised, compiled, and what the emulator found."""

    request: Request
    compiled: Compiled
    grid: tuple[int, ...]
    report: Report | None = None


@dataclass
class Emulation:
    """Which GPU, which schedule, and all launches so far."""

    target: str
    schedule: Schedule = Schedule()
    counters: bool = False
    execute: bool = True
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def emulated(
    target: str,
    schedule: Schedule = Schedule(),
    counters: bool = False,
    execute: bool = True,
) -> Iterator[Emulation]:
    """Everything launched inside goes through the compiler and (execute) the emulator."""
    emulation = Emulation(target, schedule, counters, execute)
    original = launch.kernels
    stand_ins = {
        name: _Kernel(name, fn.params, emulation)
        for name, fn in vars(original()).items()
        if name != "TensorDescriptor"
    }
    fakes = SimpleNamespace(TensorDescriptor=Descriptor, **stand_ins)
    launch.kernels = lambda: fakes  # type: ignore[assignment]
    try:
        yield emulation
    finally:
        launch.kernels = original


class _Kernel:
    def __init__(self, name: str, params: list[Any], emulation: Emulation) -> None:
        self.name, self.params, self.emulation = name, params, emulation

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = {n: kwargs.pop(n) for n in ("num_warps", "num_stages") if n in kwargs}
        values = dict(zip((p.name for p in self.params), args, strict=False)) | kwargs
        request = specialise(self.name, self.params, values, self.emulation.target, **options)
        compiled = compile_kernel(request)
        assert not compiled.error, f"{request}: {compiled.error}"
        done = Launch(request, compiled, grid)
        self.emulation.launches.append(done)
        if self.emulation.execute:
            constants = dict(request.constants)
            passed = {p.name: values[p.name] for p in self.params if p.name not in constants}
            outputs = _outputs(self.name, values)
            done.report = _execute(compiled, grid, passed, outputs, self.emulation)


def specialise(
    name: str,
    params: list[Any],
    values: dict[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Request:
    """What Triton's launcher makes of argument values: None and 1 are constants, 16 divides or not."""
    types, constants, aligned = [], [], []
    for param in params:
        value = values[param.name]
        kind, is_aligned = "constexpr", False
        if not param.is_constexpr:
            kind, is_aligned = _specialise(value)
        if param.do_not_specialize and isinstance(value, int):
            kind, is_aligned = "i32" if value < 1 << 31 else "i64", False
        types.append((param.name, kind))
        if kind == "constexpr":
            constants.append((param.name, value))
        if is_aligned:
            aligned.append(param.name)
    return Request(
        name, tuple(types), tuple(constants), tuple(aligned), target, num_warps, num_stages
    )


def _specialise(value: Any) -> tuple[str, bool]:
    """The type of an argument, and whether 16 is known to divide it."""
    if value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, Descriptor):
        rows, cols = value.block_shape
        return f"tensordesc<{_TYPES[value.base.dtype]}[{rows}, {cols}]>", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return "i32" if value < 1 << 31 else "i64", value % 16 == 0


def _outputs(name: str, values: dict[str, Any]) -> set[int]:
    """The addresses that a launch must write before it reads them."""
    names = {"shrink": ["s"], "reduce": ["da", "db"], "sum": ["first_out", "second_out"]}.get(name)
    if names is None:
        names = ["y"] * (not values["ACCUMULATE"]) + ["s"] * (values["a"] is not None)
    tensors = (getattr(values[n], "base", values[n]) for n in names)
    return {t.data_ptr() for t in tensors if t is not None}


def _execute(
    compiled: Compiled,
    grid: tuple[int, ...],
    values: dict[str, Any],
    outputs: set[int],
    emulation: Emulation,
) -> Report:
    buffers = _Buffers(outputs)
    maps = iter(compiled.descriptors)
    args: list[Any] = []
    for value in values.values():
        if isinstance(value, Tensor):
            args.append(buffers.argument(value))
        elif isinstance(value, Descriptor):
            args += _descriptor(value, next(maps), buffers)
        else:
            args.append(value)
    report = run(
        parse(compiled.ptx),
        compiled_name(compiled),
        grid,
        compiled.threads,
        args,
        shared=compiled.shared,
        schedule=emulation.schedule,
        counters=emulation.counters,
    )
    return report.check()


def compiled_name(compiled: Compiled) -> str:
    """The entry point of the PTX."""
    return compiled.ptx.split(".entry", 1)[1].split("(", 1)[0].strip()


class _Buffers:
    """The memory of tensors as numpy, the same array each time: kernels write into the tensors."""

    def __init__(self, outputs: set[int]) -> None:
        self.arrays: dict[int, np.ndarray] = {}
        self.outputs = outputs

    def array(self, t: Tensor) -> np.ndarray:
        address = t.data_ptr()
        if address not in self.arrays:
            extent = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            flat = torch.as_strided(t, (1 + extent,), (1,))
            self.arrays[address] = flat.view(_STORAGE[t.element_size()]).numpy()
        return self.arrays[address]

    def argument(self, t: Tensor) -> np.ndarray | Uninitialised:
        array = self.array(t)
        return Uninitialised(array) if t.data_ptr() in self.outputs else array


def _descriptor(d: Descriptor, meta: dict[str, Any], buffers: _Buffers) -> list[Any]:
    size = d.base.element_size()
    made = TensorMap(
        buffers.array(d.base),
        {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[_TYPES[d.base.dtype]],
        d.shape,
        meta["block_size"],
        _SWIZZLE_BYTES[meta["swizzle"]],
        [stride * size for stride in d.strides],
    )
    return [made, *map(np.int32, d.shape), *map(np.int64, d.strides)]
