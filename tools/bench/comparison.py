# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Tables, goals and the plot of `tools.bench.side_by_side`."""

import html
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tools.soft_npu import suite

PACKAGE, ITSELF, UNQUANTIZED = "this package", "vllm-ascend", "16-bit model"
MIXED = "qwen3-moe/w8a8-channel-dynamic+"
FP8_BLOCK = "dense/fp8-block"
MXFP8 = "dense/mxfp8@A5"
PLOT = "side-by-side.svg"
IMAGE = (
    f"![Launches of a decode step, and device memory at load, ours and theirs]({PLOT})"
)
PHASES = ("imports, config", "load", "cache, graphs")
GRAPHS = {
    "num_graphs_seen": "graphs of the model",
    "num_backend_compilations": "pieces compiled",
    "num_cudagraph_captured": "captured",
}
MAX_PEAK = 1.02
COUNTS_HEADER = (
    *("checkpoint", "vllm-ascend", "served by", "launches: prefill", "decode", "waits"),
    *("copies to host", "to device", "allocations", "load: peak / resident"),
    "copied to host",
)


class Counts(NamedTuple):
    """What an engine did in one phase.

    Attributes:
        launches: Number of launches, by operator.
        waits: How often the host waited for the device.
        to_host: Copies to the host.
        to_host_bytes: Their bytes.
        to_device: Copies to the device.
        to_device_bytes: Their bytes.
        allocations: Allocations of device memory, most of them from torch's cache.

    """

    launches: dict[str, int]
    waits: int
    to_host: int
    to_host_bytes: int
    to_device: int
    to_device_bytes: int
    allocations: int

    def __sub__(self, other: "Counts") -> "Counts":
        launches = Counter(self.launches)
        launches.subtract(other.launches)
        numbers = (a - b for a, b in zip(self[1:], other[1:]))
        return Counts({k: n for k, n in launches.items() if n}, *numbers)

    @property
    def launched(self) -> int:
        """Launches of all operators."""
        return sum(self.launches.values())


class Row(NamedTuple):
    """What one engine did; see `side_by_side.measure`."""

    checkpoint: str
    release: str
    server: str
    measured: dict[str, Any]

    def phase(self, name: str) -> Counts:
        return Counts(*self.measured[name])

    @property
    def title(self) -> str:
        return f"{suite.contents(self.checkpoint)}, {self.release}"


class Pair(NamedTuple):
    """This package, and what it is compared with."""

    ours: Row
    other: Row

    @property
    def is_own(self) -> bool:
        """Whether vllm-ascend serves the quantized checkpoint, too."""
        return self.other.server.startswith(ITSELF)


class Goal(NamedTuple):
    """What this package should do.

    Attributes:
        text: The goal.
        applies: Whether it is a goal for a pair.
        measure: What this package does, and the most that it should do.

    """

    text: str
    applies: Callable[[Pair], bool]
    measure: Callable[[Pair], tuple[float, float]]


_FEWER = "fewer launches in a layer of experts"
_IN_THE_END = "no more memory in the end"
_PEAK = "at load, at most what stays and one expert or layer, times"
_SAME = "the same operators, which up to 0.26 vllm-ascend's runner launches"
_NZ = "FRACTAL_NZ of a layer's first product is a copy, in vllm-ascend too"
_WORKING = (
    "FP8 is resolved some rows at a time, with up to 3 MiB beside them: whatever the "
    "size of the model"
)
_UNPROVEN = (
    "counts of rows instead of their sums would save one, but no chip's values are "
    "known for that call of int8 weights"
)
_TRANSPOSED = "as the 16-bit model, whose experts vllm-ascend copies layer by layer"
_BIASES = (
    "biases are in fp32, as the operator takes them; vllm-ascend converts them in each "
    "step, which is a launch more"
)
# By how much goals are missed at most, and why, by goal and checkpoint.
KNOWN = {
    (_FEWER, "moe-w8a8"): (1, _UNPROVEN),
    (_FEWER, f"{MIXED}w4a16-g32"): (1, _SAME),
    (_FEWER, f"{MIXED}w4a8-channel"): (1, _SAME),
    (_FEWER, "qwen3-moe/fp8-channel-dynamic@A5"): (1, _SAME),
    (_PEAK, "moe-w8a8"): (0.15, _NZ),
    (_PEAK, f"{MIXED}w4a8-channel"): (0.15, _NZ),
    (_PEAK, FP8_BLOCK): (0.35, _WORKING),
    (_PEAK, "qwen3-moe/fp8-channel-dynamic"): (0.18, _TRANSPOSED),
    (_PEAK, "qwen3-moe/fp8-channel-dynamic@A5"): (0.21, _TRANSPOSED),
    (_IN_THE_END, MXFP8): (2048, _BIASES),
}


def _of_steps(number: Callable[[Counts], int]) -> Callable[[Pair], tuple[float, float]]:
    def measure(pair: Pair) -> tuple[float, float]:
        steps = [
            (number(pair.ours.phase(name)), number(pair.other.phase(name)))
            for name in ("prefill", "decode")
        ]
        return max(steps, key=lambda step: step[0] - step[1])

    return measure


def _of_load(name: str) -> Callable[[Pair], tuple[float, float]]:
    return lambda pair: (pair.ours.measured[name], pair.other.measured[name])


def _peak(pair: Pair) -> tuple[float, float]:
    measured = pair.ours.measured
    return (measured["peak"] - measured["part"]) / measured["resident"], MAX_PEAK


def _in_a_layer(pair: Pair) -> tuple[float, float]:
    """Launches that this package has more in a layer of experts; at most -1."""
    ours, other = (row.phase("decode").launched for row in pair)
    return (ours - other) / max(pair.ours.measured["experts"], 1), -1


def _is_own(pair: Pair) -> bool:
    return pair.is_own


GOALS = (
    Goal("no more launches in a step", _is_own, _of_steps(lambda c: c.launched)),
    Goal(
        _FEWER,
        lambda pair: pair.is_own and pair.ours.measured["experts"] > 0,
        _in_a_layer,
    ),
    Goal("no more waits in a step", lambda pair: True, _of_steps(lambda c: c.waits)),
    Goal(
        "no more copies in a step",
        _is_own,
        _of_steps(lambda c: c.to_host + c.to_device),
    ),
    Goal(
        "no more bytes copied in a step",
        _is_own,
        _of_steps(lambda c: c.to_host_bytes + c.to_device_bytes),
    ),
    Goal("no more allocations in a step", _is_own, _of_steps(lambda c: c.allocations)),
    Goal(
        "no more bytes copied to the host at load",
        _is_own,
        lambda pair: (
            pair.ours.phase("load").to_host_bytes,
            pair.other.phase("load").to_host_bytes,
        ),
    ),
    Goal("no more memory at load, at most", _is_own, _of_load("peak")),
    Goal(_IN_THE_END, _is_own, _of_load("resident")),
    Goal(
        _PEAK,
        lambda pair: True,
        _peak,
    ),
)


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Rows of this package, each with the one that follows it."""
    return [Pair(a, b) for a, b in zip(rows, rows[1:]) if a.server == PACKAGE]


class Verdict(NamedTuple):
    """Whether a goal is met.

    Attributes:
        goal: The goal's text.
        worst: The pair that is worst.
        value: What this package does there.
        bound: The most that it should do.
        missed: Pairs that miss it, and by how much.

    """

    goal: str
    worst: Pair
    value: float
    bound: float
    missed: list[tuple[Pair, float]]

    @property
    def unknown(self) -> list[Pair]:
        """Pairs that miss it by more than `KNOWN` explains."""
        return [
            pair
            for pair, excess in self.missed
            if excess > KNOWN.get((self.goal, pair.ours.checkpoint), (0, ""))[0]
        ]


def verdicts(found: Sequence[Pair]) -> Iterator[Verdict]:
    """Judge each goal for which there is a pair."""
    for goal in GOALS:
        judged = [(goal.measure(pair), pair) for pair in found if goal.applies(pair)]
        if not judged:
            continue
        (value, bound), worst = max(judged, key=lambda x: x[0][0] - x[0][1])
        missed = [(pair, a - b) for (a, b), pair in judged if a > b]
        yield Verdict(goal.text, worst, value, bound, missed)


def _table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in cells)


def _names(row: Row) -> tuple[str, str]:
    return suite.contents(row.checkpoint), row.release


def counts_line(row: Row) -> list[object]:
    """The cells of `COUNTS_HEADER`."""
    load, prefill, decode = map(row.phase, ("load", "prefill", "decode"))
    peak, resident = row.measured["peak"], row.measured["resident"]
    return [
        *(*_names(row), row.server, prefill.launched, decode.launched, decode.waits),
        f"{decode.to_host}, {decode.to_host_bytes} B",
        f"{decode.to_device}, {decode.to_device_bytes} B",
        decode.allocations,
        f"{peak / 2**20:.2f} / {resident / 2**20:.2f} MiB",
        f"{load.to_host_bytes} B",
    ]


def differences(pair: Pair, phase: str) -> str:
    """Operators that one launches more often than the other, as `name a : b`."""
    a, b = (row.phase(phase).launches for row in pair)
    changed = [
        f"`{name.partition('::')[2]}` {a.get(name, 0)} : {b.get(name, 0)}"
        for name in sorted({*a, *b})
        if a.get(name, 0) != b.get(name, 0)
    ]
    return ", ".join(changed) or "none"


def _operators(found: Sequence[Pair]) -> str:
    lines = [
        (*_names(pair.ours), pair.other.server, differences(pair, "decode"))
        for pair in found
    ]
    header = (
        "checkpoint",
        "vllm-ascend",
        "beside",
        "operators that differ, ours : its",
    )
    return _table(header, lines)


def _phases(row: Row) -> tuple[float, float, float]:
    """Seconds of `PHASES`: each part of loading a small model takes milliseconds."""
    first, *parts, last = row.measured["phases"]
    return first, sum(parts), last


def _graphs(found: Sequence[Pair]) -> str:
    lines = [
        (
            *_names(pair.ours),
            pair.other.server,
            *(
                f"{pair.ours.measured['graphs'][key]} : "
                f"{pair.other.measured['graphs'][key]}"
                for key in GRAPHS
            ),
            *(f"{a / b:.2f}" for a, b in zip(*map(_phases, pair))),
        )
        for pair in found
        if "graphs" in pair.ours.measured
    ]
    header = ("checkpoint", "vllm-ascend", "beside", *GRAPHS.values(), *PHASES)
    return _table(header, lines) if lines else ""


def number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def goals_line(verdict: Verdict) -> tuple[object, ...]:
    """The cells of a goal."""
    reasons = {
        KNOWN[verdict.goal, name][1]
        for name in sorted({pair.ours.checkpoint for pair, _ in verdict.missed})
        if (verdict.goal, name) in KNOWN
    }
    met = f"in {len(verdict.missed)} rows not" if verdict.missed else "yes"
    value, bound = number(verdict.value), number(verdict.bound)
    text = "; ".join([met, *sorted(reasons)])
    return verdict.goal, verdict.worst.ours.title, value, bound, text


def report(rows: Sequence[Row]) -> str:
    """All tables, as Markdown."""
    found = pairs(rows)
    goals = _table(
        ("goal", "worst row", "measured", "at most", "met"),
        [goals_line(verdict) for verdict in verdicts(found)],
    )
    parts = (
        _table(COUNTS_HEADER, [counts_line(row) for row in rows]),
        "What a decode step launches more or less often:\n\n" + _operators(found),
        "Graphs of the engine that uses them, as ours : its, and the CPU seconds of "
        "its start, ours / its, in one run each:\n\n" + _graphs(found),
        "The goals; *measured* is this package in the worst row:\n\n" + goals,
    )
    return "\n".join(parts)


def plot(page: str) -> str:
    """Draw launches and memory of the page's first table as SVG."""
    width, bar, gap, left, half = 900, 11, 16, 300, 210
    lines = _rows_of(page)
    scales = [max(float(line[i].split()[0]) for line in lines) or 1 for i in (4, 9)]
    shapes, y = [], 40
    for ours, other in zip(lines[::2], lines[1::2]):
        titles = (ours[0], f"{ours[1]}, beside {other[2].replace('`', '')}")
        for place, title in enumerate(titles):
            shapes.append(_text(left - 8, y + bar * (place + 1) - 2, title, "end"))
        for line, color in ((ours, "#c2410c"), (other, "#64748b")):
            peak, _, resident = line[9].removesuffix(" MiB").split()
            values = ((0, line[4], 1.0), (1, peak, 0.45), (1, resident, 1.0))
            for column, value, opacity in values:
                x = left + column * (half + 70)
                size = float(value) / scales[column] * half
                shapes.append(
                    f'<rect x="{x}" y="{y}" width="{size:.1f}" height="{bar - 1}" '
                    f'fill="{color}" opacity="{opacity}"/>'
                )
            for column, label in ((0, line[4]), (1, f"{peak} / {resident}")):
                at = float(label.split()[0]) / scales[column] * half
                x = left + column * (half + 70)
                shapes.append(_text(x + at + 4, y + bar - 2, label))
            y += bar
        y += gap
    shapes += [
        _text(left, 24, "launches of a decode step"),
        _text(left + half + 70, 24, "MiB at load: at most / in the end"),
        _text(left - 8, 24, "orange: this package", "end"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" '
        'font-family="sans-serif" font-size="10">\n'
        f'<rect width="{width}" height="{y}" fill="#ffffff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="#1e293b">'
        f"{html.escape(text)}</text>"
    )


def _rows_of(page: str) -> list[list[str]]:
    """Cells of the table with `COUNTS_HEADER`."""
    _, _, rest = page.partition(f"| {' | '.join(COUNTS_HEADER)} |\n")
    table, _, _ = rest.partition("\n\n")
    return [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
