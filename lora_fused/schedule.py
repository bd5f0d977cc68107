"""How long a list of tiles takes on a number of slots (multiprocessors times resident blocks).

A free slot takes the next tile of the list. The closed forms here are what that gives for tiles of
equal duration; the tests hold them against a simulation, tile by tile.
"""

from __future__ import annotations


def waves(tiles: int, slots: int) -> int:
    """Rounds that `tiles` equal tiles take."""
    return -(-tiles // slots)


def s_first_makespan(
    shrink_tiles: int, shrink_time: float, group: int, tiles: int, time: float, slots: int
) -> float:
    """When the last tile of an S-first list is done, in the unit of the durations.

    The list: tickets of `group` S tiles, `shrink_time` each, then `tiles` tiles of `time` each. No
    tile of the first round ends before the S tiles of that round are published; an upper bound of
    that wait is added.
    """
    if tiles == 0 or slots == 0:
        return 0.0
    tickets, ticket_time = waves(shrink_tiles, group), group * shrink_time
    rounds, late = divmod(tickets, slots)
    early, start = slots - late, rounds * ticket_time
    done = min(
        _done_by_early(tiles, time, early, late, ticket_time),
        _done_by_late(tiles, time, early, late, ticket_time),
    )
    wait = max(0.0, ticket_time - time) if tickets else 0.0
    return start + done + wait


def _done_by_early(tiles: int, time: float, early: int, late: int, delay: float) -> float:
    """The least multiple k of `time` by which all tiles are done.

    `early` slots do k tiles by then; `late` ones, free only after `delay`, k − ⌈delay / time⌉.
    """
    missed = -int(-delay // time) if late else 0
    k = waves(tiles + late * missed, early + late)
    if k < missed:
        k = waves(tiles, early)
    return max(k * time, delay if late else 0.0)


def _done_by_late(tiles: int, time: float, early: int, late: int, delay: float) -> float:
    """The same among the moments `delay` + k · `time`, when a late slot finishes a tile."""
    if not late:
        return float("inf")
    head_start = int(delay // time)
    k = max(0, waves(max(0, tiles - early * head_start), early + late))
    return delay + k * time
