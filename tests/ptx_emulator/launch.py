"""The public face: run one kernel of a PTX text on numpy arrays."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import (  # noqa: F401  (every module registers its opcodes)
    dependent_launch,
    ops_async,
    ops_atomic,
    ops_bits,
    ops_convert,
    ops_float,
    ops_integer,
    ops_matrix,
    ops_mbarrier,
    ops_memory,
    ops_sync,
    ops_tcgen05,
    ops_tensor_copy,
    ops_warp,
    ops_wgmma,
    register_pool,
)
from .instruction import Kernel
from .machine import Machine
from .memory import GlobalSpace
from .placement import Layout, place_variables
from .report import Report
from .schedule import TOGETHER, Schedule
from .syntax import Module, parse

MAX_RESIDENT = 64


@dataclass(frozen=True, eq=False)
class Uninitialised:
    """A buffer that the kernel must write before it reads."""

    array: np.ndarray


@dataclass(frozen=True, eq=False)
class Struct:
    """A parameter passed by value: fields with their natural alignment; arrays are pointers."""

    fields: tuple

    def __init__(self, *fields) -> None:
        object.__setattr__(self, "fields", fields)


@dataclass(frozen=True, eq=False)
class Offset:
    """A pointer into a buffer, `nbytes` behind its start; the buffer may be `Uninitialised`."""

    array: np.ndarray | Uninitialised
    nbytes: int


class TensorMap:
    """A `__grid_constant__` tensor map of an array; see tensor_map.encode_tiled.

    `shape` and `box` are given outermost first, as torch would print them."""

    def __init__(
        self,
        array: np.ndarray,
        kind: str,
        shape,
        box,
        swizzle: int,
        strides=None,
        nan_fill: bool = False,
    ) -> None:
        self.array, self.kind, self.shape, self.box = array, kind, tuple(shape), tuple(box)
        self.swizzle, self.nan_fill = swizzle, nan_fill
        size = array.itemsize
        if strides is None:
            strides = [size * int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape))]
        self.strides = tuple(strides)

    def encode(self, address: int) -> bytes:
        from . import tensor_map
        from .layouts import Swizzle

        return bytes(
            tensor_map.encode_tiled(
                element_type=self.kind,
                global_address=address,
                global_dim=self.shape[::-1],
                global_stride=self.strides[:-1][::-1],
                box_dim=self.box[::-1],
                element_stride=(1,) * len(self.shape),
                interleave=0,
                swizzle=Swizzle(self.swizzle),
                nan_fill=self.nan_fill,
            )
        )


class _Buffers:
    """Distinct arrays among the arguments, in order of appearance."""

    def __init__(self, args: Sequence) -> None:
        self.arrays: list[np.ndarray] = []
        self.initialised: list[bool] = []
        for arg in args:
            self._collect(arg)

    def _collect(self, arg) -> None:
        if isinstance(arg, Struct):
            for field in arg.fields:
                self._collect(field)
        elif isinstance(arg, (TensorMap, Offset)):
            self._collect(arg.array)
        elif isinstance(arg, Uninitialised):
            self._add(arg.array, False)
        elif isinstance(arg, np.ndarray):
            self._add(arg, True)

    def _add(self, array: np.ndarray, initialised: bool) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("buffers must be contiguous arrays")
        if all(array is not known for known in self.arrays):
            self.arrays.append(array)
            self.initialised.append(initialised)

    def index(self, array: np.ndarray) -> int:
        return next(i for i, known in enumerate(self.arrays) if known is array)


def _scalar(value, size: int) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def prepare(
    ptx: str | Module,
    kernel: str | Kernel,
    grid,
    block,
    args: Sequence = (),
    *,
    cluster=1,
    shared: int = 0,
) -> Machine:
    """A machine that is ready to build instructions but has not built any."""
    return _prepare(ptx, kernel, grid, block, args, cluster, shared, 1, TOGETHER, False)[0]


def _prepare(
    ptx, kernel, grid, block, args, cluster, shared, resident, schedule, counters, registers=None
):
    module = parse(ptx) if isinstance(ptx, str) else ptx
    parsed = module.kernel(kernel) if isinstance(kernel, str) else kernel
    if len(args) > len(parsed.params):
        raise ValueError(f"{parsed.name} takes {len(parsed.params)} arguments, got {len(args)}")
    buffers = _Buffers(args)
    variables = place_variables(
        module, parsed, shared, [max(array.nbytes, 1) for array in buffers.arrays]
    )
    layout = Layout(grid, block, cluster, resident)
    _check_directives(parsed, layout)
    machine = Machine(module, parsed, layout, variables, schedule, counters, registers)
    for i, array in enumerate(buffers.arrays):
        _fill(
            machine.memory,
            i,
            array.view(np.uint8).reshape(-1) if array.size else array,
            buffers.initialised[i],
        )
    for i, name, data in variables.global_data:
        variables.addresses[name] = machine.memory.starts[i] + GlobalSpace.base
        _fill(
            machine.memory,
            i,
            np.frombuffer(data.ljust(variables.global_sizes[i], b"\0"), np.uint8),
            True,
        )
    _write_params(machine, parsed, args, buffers)
    return machine, buffers


def run(
    ptx: str | Module,
    kernel: str | Kernel,
    grid,
    block,
    args: Sequence,
    *,
    cluster=1,
    shared: int = 0,
    resident: int = MAX_RESIDENT,
    schedule: Schedule = TOGETHER,
    counters: bool = False,
    registers: int | None = None,
    after: Sequence[np.ndarray] = (),
) -> Report:
    """Execute a kernel and return what was found; output arrays are updated in place.

    `args`: numpy arrays (passed as pointers), `Uninitialised(array)`, numbers, `Struct`s,
    `TensorMap`s or raw bytes.  `shared` is the dynamic shared memory in bytes, `resident` how many
    blocks the device holds at a time, `registers` what ptxas gives each thread (for setmaxnreg),
    `after` the buffers that a kernel which may still be running works on (dependent launch)."""
    machine, buffers = _prepare(
        ptx, kernel, grid, block, args, cluster, shared, resident, schedule, counters, registers
    )
    for array in after:
        start = machine.memory.starts[buffers.index(array)]
        machine.dependent_launch.ranges.append((start, start + array.nbytes))
    machine.build()
    report = machine.run()
    for i, array in enumerate(buffers.arrays):
        start = machine.memory.starts[i]
        if array.size and array.flags.writeable:
            array.view(np.uint8).reshape(-1)[:] = machine.memory.data[start : start + array.nbytes]
    _take_apart(machine)
    return report


def _take_apart(machine: Machine) -> None:
    """Its parts and the built instructions refer to each other: without this they outlive it."""
    parts = [part for part in vars(machine).values() if getattr(part, "machine", None) is machine]
    for part in (*parts, machine):
        vars(part).clear()


def _check_directives(kernel: Kernel, layout: Layout) -> None:
    """`.reqntid`, `.maxntid`, `.reqnctapercluster` are promises about the launch."""
    required = kernel.directives.get("reqntid")
    if required and tuple((*required, 1, 1, 1)[:3]) != layout.block:
        raise ValueError(f"{kernel.name} needs blocks of {required}, got {layout.block}")
    most = kernel.directives.get("maxntid")
    if most and layout.threads > int(np.prod(most)):
        raise ValueError(f"{kernel.name} allows {most} threads, got {layout.block}")
    cluster = kernel.directives.get("reqnctapercluster")
    if cluster and tuple((*cluster, 1, 1, 1)[:3]) != layout.cluster:
        raise ValueError(f"{kernel.name} needs clusters of {cluster}, got {layout.cluster}")


def _fill(memory: GlobalSpace, index: int, data: np.ndarray, initialised: bool) -> None:
    start = memory.starts[index]
    memory.data[start : start + len(data)] = data
    memory.allocate(start, memory.lengths[index], initialised)


def _write_params(machine: Machine, kernel: Kernel, args: Sequence, buffers: _Buffers) -> None:
    memory = machine.memory

    def address(array: np.ndarray) -> int:
        return memory.starts[buffers.index(array)] + GlobalSpace.base

    def encode(arg, size: int) -> bytes:
        if isinstance(arg, Offset):
            start = int.from_bytes(encode(arg.array, 8), "little")
            return (start + arg.nbytes).to_bytes(8, "little")
        if isinstance(arg, Uninitialised):
            arg = arg.array
        if isinstance(arg, np.ndarray):
            return address(arg).to_bytes(8, "little")
        if isinstance(arg, TensorMap):
            return arg.encode(address(arg.array))
        if isinstance(arg, Struct):
            return _struct(arg, encode)
        return _scalar(arg, size)

    for variable, offset, arg in zip(
        kernel.params, machine.variables.param_offsets, args, strict=False
    ):
        data = encode(arg, variable.size)
        if len(data) > variable.size:
            raise ValueError(
                f"argument of {len(data)} bytes for {variable.name} ({variable.size} bytes)"
            )
        machine.params.data[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        machine.params.allocate(offset, variable.size, True)


def _struct(arg: Struct, encode) -> bytes:
    out = b""
    for field in arg.fields:
        data = encode(field, 4 if isinstance(field, (int, float)) else 8)
        align = min(len(data), 8)
        out += b"\0" * (-len(out) % align) + data
    return out
