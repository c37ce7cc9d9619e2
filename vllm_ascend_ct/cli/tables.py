# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the commands print for people to read."""

import shutil
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_ascend_ct.cli.inspect import Report, Row

_MIB, _GIB = 2**20, 2**30
_WIDTH = 160
# Narrower, the table would lose columns; a terminal breaks its lines.
_NARROWEST = 120


def console() -> Console:
    """The terminal; a file gets lines of a width that an issue shows."""
    width = max(shutil.get_terminal_size((_WIDTH, 0)).columns, _NARROWEST)
    return Console(width=width, highlight=False, markup=False)


def show(report: "Report") -> None:
    """Print what was found of a checkpoint."""
    out = console()
    ranks = f"tensor parallel {report.tensor_parallel_size}"
    if report.expert_parallel_size > 1:
        ranks += f", expert parallel {report.expert_parallel_size}"
    out.print(
        f"{report.checkpoint} on Ascend {report.soc}, {report.dtype}, {ranks} "
        f"({report.platform})"
    )
    if report.rows:
        out.print(_table(report.rows))
    unproven = {call: None for row in report.rows for call in row.unproven}
    if unproven:
        out.print(
            f"* unproven on {report.soc}: no public code is known to make such a call "
            "there."
        )
    for refusal, names in _refusals(report.rows):
        out.print(f"Refused: {', '.join(names)}", style="bold")
        for name, text in refusal.items():
            out.print(f"  {name}: {text}")
    for error in report.errors:
        out.print(f"Not served: {error}", style="bold")
    if report.is_served:
        verdict = "Served" if report.basis == "headers" else "The config is served"
        out.print(
            f"{verdict}, {_size(report.bytes_per_rank)} of weights a rank.",
            style="bold",
        )
    for note in report.notes:
        out.print(note)


def _refusals(rows: "list[Row]") -> Iterator[tuple[dict[str, str], list[str]]]:
    """Each refusal, and the layers that it is true of; it names the first."""
    named: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.refusal:
            cause = (row.refusal["what"], row.refusal["remedy"])
            named.setdefault(cause, []).append(row)
    for alike in named.values():
        assert alike[0].refusal is not None
        counts: Counter[str] = Counter()
        for row in alike:
            counts[row.layers] += row.count
        yield alike[0].refusal, [f"{name} ({n})" for name, n in counts.items()]


def _table(rows: "list[Row]") -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("scheme")
    table.add_column("served by", no_wrap=True)
    table.add_column("operators", overflow="fold")
    table.add_column("a rank", justify="right", no_wrap=True)
    for row in rows:
        size = row.bytes_per_rank
        calls = [f"{call}{' *' if call in row.unproven else ''}" for call in row.calls]
        table.add_row(
            row.layers,
            str(row.count),
            row.scheme,
            row.served_by,
            "\n".join(calls),
            "" if size is None else _size(size),
        )
    return table


def _size(count: int) -> str:
    unit, name = (_GIB, "GiB") if count >= _GIB else (_MIB, "MiB")
    return f"{count / unit:.2f} {name}"
