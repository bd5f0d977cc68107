"""Runs the package's launches on CPU tensors: compiled for a GPU, executed by the PTX emulator.

`emulated("sm_90")` takes the place of the kernels that lora_fused.backends.triton launches, so that
the whole host side runs as it ships: grids, strides, workspaces, descriptors, autograd.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fused.backends.triton import launch
from tests.ptx_emulator import (
    TOGETHER,
    Offset,
    Report,
    Schedule,
    TensorMap,
    Uninitialised,
    parse,
    run,
)
from tests.ptx_emulator.syntax import Module
from tests.triton.compiled import Compiled, Map, Pointer, Request, compile_kernel

DEFAULT_OPTIONS = {"num_warps": 4, "num_stages": 3}
_MAP_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
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
    buffers: list[int] = field(default_factory=list)

    def bytes(self, kind: str, t: Tensor) -> int:
        """Bytes that the launch loaded from or stored to the memory of a tensor."""
        assert self.report is not None
        at = self.buffers.index(_storage(t)[0])
        return int(self.report.counters.buffer_bytes[kind, at])


@dataclass
class Emulation:
    """Which GPU, which schedule, and all launches so far."""

    target: str
    schedule: Schedule = TOGETHER
    counters: bool = False
    execute: bool = True
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def emulated(
    target: str,
    schedule: Schedule = TOGETHER,
    counters: bool = False,
    execute: bool = True,
) -> Iterator[Emulation]:
    """Everything launched inside goes through the compiler and (execute) the emulator."""
    emulation = Emulation(target, schedule, counters, execute)
    original = launch.kernels
    stand_ins = {name: _Kernel(name, emulation) for name in ("matmul", "shrink", "reduce", "sum")}
    fakes = SimpleNamespace(TensorDescriptor=Descriptor, **stand_ins)
    launch.kernels = lambda: fakes  # type: ignore[assignment]
    try:
        yield emulation
    finally:
        launch.kernels = original


class _Kernel:
    def __init__(self, name: str, emulation: Emulation) -> None:
        self.name, self.emulation = name, emulation

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = {n: kwargs.pop(n, default) for n, default in DEFAULT_OPTIONS.items()}
        constants = tuple(kwargs.items())
        # Numbers beside the members are not specialised (do_not_specialize in the kernels).
        seen = (seen_by_compiler(args[0]), *(17 for _ in args[1:]))
        request = Request(self.name, seen, constants, self.emulation.target, **options)
        compiled = compile_kernel(request)
        assert not compiled.error, f"{self.name}, {request.target}: {compiled.error}"
        done = Launch(request, compiled, grid)
        self.emulation.launches.append(done)
        if self.emulation.execute:
            outputs = _outputs(self.name, args, kwargs)
            values = [*_flat(args[0]), *args[1:]]
            done.report, done.buffers = _execute(compiled, grid, values, outputs, self.emulation)


def _flat(args: tuple[Any, ...]) -> list[Any]:
    """The arguments that the compiled kernel still takes, in order."""
    values = []
    for arg in args:
        if isinstance(arg, tuple):
            values += _flat(arg)
        elif arg is not None and not (isinstance(arg, int) and arg == 1):
            values.append(arg)
    return values


def seen_by_compiler(value: Any) -> Any:
    """An argument as it matters to the compiler: one value for all that share their code.

    Triton makes a constant of 1, and asks of other integers whether 16 divides them and whether
    they fit 32 bits.
    """
    if isinstance(value, Tensor):
        return Pointer(str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0)
    if isinstance(value, Descriptor):
        return Map(str(value.base.dtype).removeprefix("torch."), tuple(value.block_shape))
    if isinstance(value, tuple):
        seen = [seen_by_compiler(v) for v in value]
        return type(value)(*seen) if hasattr(value, "_fields") else tuple(seen)
    if isinstance(value, float):
        return 0.5
    if value is None or value == 1:
        return value
    return (16 if value % 16 == 0 else 17) + (0 if value < 1 << 31 else 1 << 40)


def _outputs(kernel: str, args: tuple[Any, ...], constants: dict[str, Any]) -> set[int]:
    """The addresses that a launch must write before it reads them."""
    tensors = []
    for p in args[0]:
        if kernel == "matmul":
            tensors += [] if constants["ACCUMULATE"] else [getattr(p.y, "base", p.y)]
            tensors += [] if p.a is None else [p.s]
        else:
            tensors.append(p.s if kernel == "shrink" else p.out)
    return {_storage(t)[0] for t in tensors}


def _storage(t: Tensor) -> tuple[int, int]:
    """Address of the memory that a tensor is a view of, and the tensor's offset in bytes."""
    start = t.untyped_storage().data_ptr()
    return start, t.data_ptr() - start


def _execute(
    compiled: Compiled,
    grid: tuple[int, ...],
    values: list[Any],
    outputs: set[int],
    emulation: Emulation,
) -> tuple[Report, list[int]]:
    buffers, maps = _Buffers(outputs), iter(compiled.descriptors)
    args: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            args.append(buffers.argument(value))
        elif isinstance(value, Descriptor):
            args += _descriptor(value, next(maps), buffers)
        else:
            args.append(value)
    report = run(
        _module(compiled.ptx),
        compiled_name(compiled),
        grid,
        compiled.threads,
        args,
        shared=compiled.shared,
        schedule=emulation.schedule,
        counters=emulation.counters,
    )
    return report.check(), list(buffers.arrays)


@functools.lru_cache(maxsize=32)
def _module(text: str) -> Module:
    return parse(text)


def compiled_name(compiled: Compiled) -> str:
    """The entry point of the PTX."""
    return compiled.ptx.split(".entry", 1)[1].split("(", 1)[0].strip()


class _Buffers:
    """The memory of tensors as numpy, the same array each time: kernels write into the tensors.

    A view is a pointer into the memory of its base.
    """

    def __init__(self, outputs: set[int]) -> None:
        self.arrays: dict[int, np.ndarray] = {}
        self.outputs = outputs

    def array(self, t: Tensor) -> np.ndarray:
        start, _ = _storage(t)
        if start not in self.arrays:
            size = t.untyped_storage().nbytes() // t.element_size()
            whole = torch.as_strided(t, (size,), (1,), 0)
            self.arrays[start] = whole.view(_STORAGE[t.element_size()]).numpy()
        return self.arrays[start]

    def argument(self, t: Tensor) -> Any:
        start, offset = _storage(t)
        array = self.array(t)
        buffer = Uninitialised(array) if start in self.outputs else array
        return Offset(buffer, offset) if offset else buffer


def _descriptor(d: Descriptor, meta: dict[str, Any], buffers: _Buffers) -> list[Any]:
    size = d.base.element_size()
    made = TensorMap(
        buffers.array(d.base),
        _MAP_TYPES[d.base.dtype],
        d.shape,
        meta["block_size"],
        _SWIZZLE_BYTES[meta["swizzle"]],
        [stride * size for stride in d.strides],
    )
    return [made, *map(np.int32, d.shape), *map(np.int64, d.strides)]
