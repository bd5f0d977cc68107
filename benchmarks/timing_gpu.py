"""Device time on a GPU: a call captured in a CUDA graph, replayed between two events, cold L2.

Per replay the stream holds: flush, event, replay, event. The flush overwrites a buffer twice as
large as the second-level cache, so that weights come from memory as in a model whose other layers
ran in between; it also keeps the device busy while the host queues the rest, so that the time of
launching is not counted. Works on CUDA and ROCm, whose graphs torch offers under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3  # before the capture, on a stream of their own, as torch asks for
MOST_REPEATS = 20
_LEAST_FLUSH_BYTES = 64 << 20  # for devices that do not say how large their cache is


class GraphStopwatch:
    """Times calls whose work is all on the current device; keeps one graph per call.

    A call that cannot be captured is timed by the same events without a graph, its launches
    included; `remark` then says why. Results of a call are dropped, so that all graphs
    share one pool of memory.
    """

    most_repeats = MOST_REPEATS

    def __init__(self) -> None:
        device = torch.cuda.current_device()
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(2 * l2_bytes, _LEAST_FLUSH_BYTES)
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._pool = torch.cuda.graph_pool_handle()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # By identity, and with the call itself, whose identity is its own only while it lives.
        self._replays: dict[int, tuple[Callable[[], object], Callable[[], object]]] = {}
        self._failures: dict[int, str] = {}

    def time_ns(self, call: Callable[[], object], repeats: int) -> int:
        """Nanoseconds of device time that `repeats` calls take together, each with a cold cache."""
        replay = self._replay_of(call)
        while len(self._events) < repeats:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events.append(pair)
        used = self._events[:repeats]
        for begin, end in used:
            self._flush.zero_()
            begin.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return round(1e6 * sum(begin.elapsed_time(end) for begin, end in used))

    def remark(self, call: Callable[[], object]) -> str:
        """Why a call was timed without a graph; '' for the others."""
        return self._failures.get(id(call), "")

    def _replay_of(self, call: Callable[[], object]) -> Callable[[], object]:
        if id(call) not in self._replays:
            self._replays[id(call)] = (call, self._captured(call))
        return self._replays[id(call)][1]

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        try:
            return _capture(call, self._pool).replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = (str(error).splitlines() or [""])[0]
            self._failures[id(call)] = f"timed without a CUDA graph ({reason})"
            return call


def _capture(call: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """The work of one call as a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph
