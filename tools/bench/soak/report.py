# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What a run found, and whether it may be so."""

from collections.abc import Iterable
from datetime import date
from typing import NamedTuple

from tools.bench.soak import memory
from tools.bench.soak.requests import Tally
from tools.docs import section

# Memory of a part of the run, at its start, does not count: caches fill.
WARM_UP = 0.25
# MiB a minute. vLLM's own CPU platform grows, too, with an unquantized model: by 13.6
# in a run of ten minutes; with this package it was 4.5 in one of thirty. For a software
# NPU the device's memory counts: processes hold it, resident as far as it is written.
BOUNDS = {"RSS": 6.0, "device": 0.1, "device tensors": 0.1}
COLUMNS = (
    *("checkpoint", "platform", "measured on", "minutes", "requests"),
    *("refused, as they must be", "5xx, lost or wrong"),
    *("canary: answers", "changed", "largest difference"),
    *("RSS: MiB", "MiB/min", "device: MiB", "MiB/min"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
START = "<!-- soak: tools/bench/soak -->\n"
END = "<!-- end of soak -->\n"


class Sample(NamedTuple):
    """Memory at a time, in bytes."""

    minute: float
    processes: dict[str, int]
    device: list[int]


class Result(NamedTuple):
    """What a run found."""

    checkpoint: str
    platform: str
    minutes: float
    tally: Tally
    samples: list[Sample]
    differences: list[float]

    def growth(self) -> dict[str, tuple[float, float]]:
        """MiB in the end, and MiB a minute: of processes, and of the device."""
        start = self.minutes * WARM_UP
        samples = [sample for sample in self.samples if sample.minute >= start]
        series = {"RSS": [(s.minute, sum(s.processes.values())) for s in samples]}
        for name in samples[-1].processes:
            series[name] = [(s.minute, s.processes.get(name, 0)) for s in samples]
        for index, name in enumerate(("device", "device tensors")):
            if samples[-1].device:
                series[name] = [
                    (s.minute, s.device[index]) for s in samples if s.device
                ]
        return {
            name: (points[-1][1] / memory.MIB, memory.slope(points) / memory.MIB)
            for name, points in series.items()
        }

    def failures(self) -> list[str]:
        """What must not be."""
        found = list(self.tally.failures)
        if self.tally.failed > len(found):
            found.append(f"and {self.tally.failed - len(found)} more")
        if not self.differences:
            found.append("the canary was never asked")
        growth = self.growth()
        for name, bound in BOUNDS.items():
            if name == "RSS" and "device" in growth:
                continue
            if name in growth and growth[name][1] > bound:
                found.append(f"{name} grows by {growth[name][1]:.2f} MiB a minute")
        return found

    def text(self) -> str:
        """The result for a person."""
        tally = self.tally
        lines = [f"{self.checkpoint} on {self.platform}, {self.minutes:.1f} minutes"]
        lines.append(f"requests: {tally.requests}, failed: {tally.failed}")
        for (kind, status), count in sorted(tally.statuses.items()):
            lines.append(f"  {kind}: {status} {count} times")
        for event, count in sorted(tally.events.items()):
            lines.append(f"  {event}: {count} times")
        lines.append(
            f"canary: {len(self.differences)} answers, largest mean difference "
            f"{max(self.differences, default=0):.4f}"
        )
        for name, (size, slope) in self.growth().items():
            bound = f", at most {BOUNDS[name]}" if name in BOUNDS else ""
            lines.append(f"{name}: {size:.1f} MiB, {slope:+.3f} MiB a minute{bound}")
        step = max(1, len(self.samples) // 12)
        sizes = [sum(s.processes.values()) / memory.MIB for s in self.samples[::step]]
        lines.append(f"RSS over time: {' '.join(f'{size:.0f}' for size in sizes)}")
        return "\n".join([*lines, *(f"FAILED: {each}" for each in self.failures())])

    def row(self) -> str:
        """The result as a line of the table."""
        statuses = self.tally.statuses
        refused = sum(n for (_, status), n in statuses.items() if 400 <= status < 500)
        growth = self.growth()
        device = growth.get("device tensors")
        cells = (
            *(self.checkpoint, self.platform, date.today(), f"{self.minutes:.0f}"),
            *(self.tally.requests, refused, self.tally.failed),
            *(len(self.differences), self.tally.events["canary changes"]),
            f"{max(self.differences, default=0):.4f}",
            *(f"{growth['RSS'][0]:.0f}", f"{growth['RSS'][1]:+.2f}"),
            *((f"{device[0]:.2f}", f"{device[1]:+.3f}") if device else ("", "")),
        )
        return f"| {' | '.join(map(str, cells))} |\n"


def with_rows(page: str, results: Iterable[Result]) -> str:
    """Put results into a page's text, in place of those for the same."""
    new = [result.row() for result in results]
    old = page.partition(START)[2].partition(END)[0].splitlines(keepends=True)[2:]
    written = {_subject(line) for line in new}
    kept = [line for line in old if _subject(line) not in written]
    return section.replace(page, START, END, HEADER + "".join(sorted(kept + new)))


def _subject(line: str) -> str:
    """Checkpoint and platform of a line of the table."""
    return "|".join(line.split("|")[1:3])
