"""Where things are: lanes of resident blocks, and the addresses of a kernel's variables."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from .instruction import Instruction, Kernel, Memory, Symbol, Vector, type_bytes
from .memory import SharedSpace
from .ptx_types import is_type
from .syntax import Module

Dim = tuple[int, int, int]

# Generic addresses ("Generic Addressing"): windows of the other spaces; the rest is global.
SHARED_WINDOW = 0x2_0000_0000
LOCAL_WINDOW = 0x3_0000_0000
PARAM_WINDOW = 0x4_0000_0000
WINDOW_SIZE = 0x1_0000_0000


def dim3(value) -> Dim:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (*values, 1, 1, 1)[:3]  # type: ignore[return-value]


class Layout:
    """Grid, blocks and clusters on a machine that holds `resident` blocks at a time."""

    def __init__(self, grid, block, cluster, resident: int) -> None:
        self.grid, self.block, self.cluster = dim3(grid), dim3(block), dim3(cluster)
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise ValueError(f"grid {self.grid} is not a multiple of the cluster {self.cluster}")
        self.threads = prod(self.block)
        self.cluster_size = prod(self.cluster)
        self.cluster_grid = tuple(g // c for g, c in zip(self.grid, self.cluster, strict=True))
        self.clusters = prod(self.cluster_grid)
        self.block_lanes = (self.threads + 31) // 32 * 32
        self.team_lanes = self.block_lanes * self.cluster_size
        self.teams = max(1, min(self.clusters, resident // self.cluster_size))
        self.slots = self.teams * self.cluster_size
        self.lanes = self.slots * self.block_lanes
        lane = np.arange(self.lanes)
        self.thread = lane % self.block_lanes
        self.slot = lane // self.block_lanes
        self.rank = self.slot % self.cluster_size
        self.lane_block = np.full(self.lanes, -1)
        self.lane_cluster = np.full(self.lanes, -1)

    def team_threads(self) -> np.ndarray:
        """Which lanes of a team are threads rather than padding of the last warp."""
        return np.arange(self.team_lanes) % self.block_lanes < self.threads

    def enter(self, team: int, cluster: int) -> None:
        lanes = slice(team * self.team_lanes, (team + 1) * self.team_lanes)
        self.lane_cluster[lanes] = cluster
        blocks = np.array([self.block_of(cluster, rank) for rank in range(self.cluster_size)])
        self.lane_block[lanes] = blocks[self.rank[lanes]]

    def block_of(self, cluster: int, rank: int) -> int:
        """Linear block number of a rank of a cluster."""
        at = unravel(cluster, self.cluster_grid)
        inside = unravel(rank, self.cluster)
        x, y, z = (a * c + i for a, c, i in zip(at, self.cluster, inside, strict=True))
        return int(x + self.grid[0] * (y + self.grid[1] * z))


def unravel(linear, shape) -> tuple:
    """x fastest."""
    return linear % shape[0], linear // shape[0] % shape[1], linear // (shape[0] * shape[1])


@dataclass
class Variables:
    """Addresses inside each variable's own state space, and the sizes of the spaces."""

    addresses: dict[str, int] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)
    global_sizes: list[int] = field(default_factory=list)
    global_data: list[tuple[int, str, bytes]] = field(default_factory=list)
    shared_size: int = 0
    local_stride: int = 0
    param_size: int = 0
    param_offsets: list[int] = field(default_factory=list)


def place_variables(
    module: Module, kernel: Kernel, dynamic_shared: int, buffers: list[int]
) -> Variables:
    """Static shared variables first, the dynamic ones (`.extern`) behind them."""
    out = Variables(global_sizes=list(buffers))
    for variable in kernel.params:
        out.param_size = _align(out.param_size, variable.align)
        out.param_offsets.append(out.param_size)
        _put(out, variable, out.param_size)
        out.param_size += variable.size
    variables = [*module.variables, *kernel.variables]
    for variable in variables:
        if variable.space == "shared" and not variable.extern:
            out.shared_size = _align(out.shared_size, variable.align)
            _put(out, variable, SharedSpace.start + out.shared_size)
            out.shared_size += variable.size
        elif variable.space == "local":
            out.local_stride = _align(out.local_stride, max(variable.align, 16))
            _put(out, variable, out.local_stride)
            out.local_stride += variable.size
        elif variable.space in ("global", "const"):
            out.global_data.append((len(out.global_sizes), variable.name, variable.data))
            out.spaces[variable.name] = variable.space
            out.global_sizes.append(variable.size)
    out.shared_size = _align(out.shared_size, 128) if out.shared_size else 0
    for variable in variables:
        if variable.space == "shared" and variable.extern:
            _put(out, variable, SharedSpace.start + out.shared_size)
    out.shared_size += dynamic_shared
    out.local_stride = _align(out.local_stride, 16)
    return out


def _put(out: Variables, variable, address: int) -> None:
    out.addresses[variable.name] = address
    out.spaces[variable.name] = variable.space


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def access_granule(kernel: Kernel, space: str, largest: int) -> int:
    """The smallest access to a space: races are tracked in units of it."""
    sizes = [largest]
    for ins in kernel.instructions:
        spaces = {part.split("::")[0] for part in ins.modifiers}
        if ins.opcode in ("ld", "st", "atom", "red") and (
            space in spaces or not spaces & {"global", "shared", "local", "param", "const"}
        ):
            sizes.append(access_size(ins))
        elif (
            ins.opcode == "cp" and not spaces & {"bulk", "mbarrier"} and space == "shared" in spaces
        ):
            sizes.append(ins.operands[2].value)
    return min(sizes)


def access_size(ins: Instruction) -> int:
    """Bytes one lane touches in a load, store or atomic."""
    kind = ins.modifiers[-1]
    unit = type_bytes(kind) if is_type(kind) else 4
    count = next((int(m[1:]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    return unit * count


def symbol_space(variables: Variables, operand: Memory) -> str:
    """The state space of `[variable + offset]`, "" when the base is not a variable."""
    if isinstance(operand.base, Symbol) and not isinstance(operand.base, Vector):
        return variables.spaces.get(operand.base.name, "")
    return ""
