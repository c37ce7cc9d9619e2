# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Memory of processes, and whether it grows."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


class Process(NamedTuple):
    """A process that is alive."""

    pid: int
    # Clock ticks after boot: a number of a process is used again later.
    start: int
    parent: int
    rss: int
    name: str


def processes() -> dict[int, Process]:
    """All processes that are alive."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (directory / "stat").read_text().rpartition(")")
        except OSError:  # It has ended.
            continue
        fields = rest.split()
        if fields[0] == "Z":
            continue
        process = Process(
            int(directory.name),
            start=int(fields[19]),
            parent=int(fields[1]),
            rss=int(fields[21]) * PAGE,
            name=name.partition("(")[2],
        )
        found[process.pid] = process
    return found


def tree(root: int) -> list[Process]:
    """A process and those that it has started, directly or not."""
    alive = processes()
    found = [alive[root]] if root in alive else []
    for parent in found:
        found += [each for each in alive.values() if each.parent == parent.pid]
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the line through points (x, y), by least squares."""
    return statistics.linear_regression(*zip(*points)).slope
