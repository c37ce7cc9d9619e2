# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the commands print for people to read."""

import shutil
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_ascend_ct.cli.inspect import Report, Row

_GIB = 2**30
_WIDTH = 160


def console() -> Console:
    """The terminal; a file gets lines of a width that an issue shows."""
    width = shutil.get_terminal_size((_WIDTH, 0)).columns
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
    for row in report.rows:
        if row.refusal:
            out.print(f"Refused: {row.layers} ({row.count})", style="bold")
            for name, text in row.refusal.items():
                out.print(f"  {name}: {text}")
    for error in report.errors:
        out.print(f"Refused: {error}", style="bold")
    if report.is_served:
        out.print(
            f"Served, {report.bytes_per_rank / _GIB:.2f} GiB of weights a rank.",
            style="bold",
        )
        unproven = {call: None for row in report.rows for call in row.unproven}
        if unproven:
            out.print(
                f"Unproven on {report.soc}: " + ", ".join(unproven) + ". No public "
                "code is known to make these calls there."
            )
    for note in report.notes:
        out.print(note)


def _table(rows: "list[Row]") -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("scheme")
    table.add_column("served by", no_wrap=True)
    table.add_column("operators", overflow="fold")
    table.add_column("GiB a rank", justify="right")
    for row in rows:
        size = row.bytes_per_rank
        calls = [
            f"{call}{' unproven' if call in row.unproven else ''}" for call in row.calls
        ]
        table.add_row(
            row.layers,
            str(row.count),
            row.scheme,
            row.served_by,
            "\n".join(calls),
            "" if size is None else f"{size / _GIB:.3f}",
        )
    return table
