# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Goals and tables of `tools.bench.side_by_side`, from counts that are made up."""

from pathlib import Path
from typing import Any

import pytest

from tools.bench import comparison, side_by_side
from tools.bench.comparison import ITSELF, PACKAGE, UNQUANTIZED, Pair, Row

NAME = "moe-w4a16"


def row(server: str, **changes: Any) -> Row:
    """A row; `launches` and `waits` are of a decode step."""
    counts = [{"npu::a": 3, "npu::b": changes.pop("launches", 1)}]
    counts += [changes.pop("waits", 2), 1, 4, 9, 69, 50]
    measured = {
        **dict.fromkeys(("load", "prefill", "decode"), counts),
        **{"peak": 1060, "resident": 1000, "part": 50, "experts": 2, "call": 1.5},
        **{"graphs": dict.fromkeys(comparison.GRAPHS, 3), "phases": [1.0] * 5},
    }
    return Row(NAME, "1.0", server, measured | changes)


def missed(ours: Row, other: Row) -> list[str]:
    """Goals that are missed and have no reason."""
    verdicts = comparison.verdicts([Pair(ours, other)])
    return [verdict.goal for verdict in verdicts if verdict.unknown]


def test_one_launch_less_meets_each_goal() -> None:
    # Two layers of experts, and one launch less in each.
    assert missed(row(PACKAGE), row(ITSELF, launches=3)) == []


@pytest.mark.parametrize(
    "changes, goal",
    [
        ({"launches": 4}, "no more launches in a step"),
        ({"waits": 3}, "no more waits in a step"),
        ({"peak": 1061}, "no more memory at load, at most"),
        ({"resident": 1001}, "no more memory in the end"),
        ({"peak": 1080}, "at load, at most what stays and one expert or layer, times"),
    ],
)
def test_planted_excess_misses_its_goal(changes: dict[str, int], goal: str) -> None:
    assert goal in missed(row(PACKAGE, **changes), row(ITSELF, launches=3))


def test_goals_beside_a_16_bit_model() -> None:
    """It launches less, but the host does not wait less."""
    assert missed(row(PACKAGE, launches=9), row(UNQUANTIZED)) == []
    assert missed(row(PACKAGE, waits=3), row(UNQUANTIZED)) != []


def test_status_is_of_goals_without_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(PACKAGE, launches=3), row(ITSELF, launches=3)]
    assert side_by_side.judge(rows) == 1
    goal = "fewer launches in a layer of experts"
    monkeypatch.setitem(comparison.KNOWN, (goal, NAME), (1, "the same operators"))
    assert side_by_side.judge(rows) == 0
    more = [row(PACKAGE, launches=4), rows[1]]
    assert side_by_side.judge(more) == 1
    output = capsys.readouterr().out.splitlines()
    line = next(x for x in output if "same oper" in x)
    assert line.endswith("0 | -1 | in 1 rows not; the same operators")


def test_report_says_what_differs() -> None:
    rows = [row(PACKAGE), row(ITSELF, launches=3)]
    page = side_by_side.with_report(
        f"a\n{side_by_side.START}old\n{side_by_side.END}b\n", rows
    )
    assert page.startswith("a\n") and page.endswith(f"{side_by_side.END}b\n")
    assert "old" not in page and "| `b` 1 : 3 |" in page
    assert "3 : 3 | 3 : 3 | 3 : 3 | 1.00 | 1.00 | 1.00 |" in page
    drawn = comparison.plot(page)
    # Launches, and memory at most and in the end, of both, on white.
    assert drawn.count("<rect") == 2 * 3 + 1


def test_plot_is_of_the_page() -> None:
    """If it is not: python -m tools.bench.side_by_side --write."""
    page = side_by_side.PAGE.read_text()
    assert comparison.IMAGE in page
    drawn = comparison.plot(page)
    assert Path(side_by_side.PAGE.parent / comparison.PLOT).read_text() == drawn
    assert drawn.count("<rect") > 2 * 3
