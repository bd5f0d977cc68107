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

    The list: tickets of `group` S tiles, `shrink_time` each, then `tiles` tiles of `time` each. A
    tile that runs beside the last round of tickets does not end before that round is published.
    """
    if tiles == 0 or slots == 0:
        return 0.0
    tickets, delay = waves(shrink_tiles, group), group * shrink_time
    rounds, late = divmod(tickets, slots)
    early, start = slots - late, rounds * delay
    if late == 0:
        return start + waves(tiles, slots) * time
    if delay >= time:
        return start + delay + max(0, waves(tiles - early, slots)) * time
    # By k · time an early slot does k tiles and a late one k − 1; it does k by delay + k · time.
    return start + min(
        max(waves(tiles + late, slots) * time, delay), delay + waves(tiles, slots) * time
    )


def filled_makespan(alone: float, busy: float, slots: int, late: float) -> float:
    """When a list is done between whose tiles stand smaller ones of another kind, and behind them
    more of these, which take `late` in all.

    alone: the list without them; busy: the time of all tiles but the late ones. Those begin while
    the last round still runs, and then nothing but they is left.
    """
    return max(alone, busy / max(1, slots) + late)
