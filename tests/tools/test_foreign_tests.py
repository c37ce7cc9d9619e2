# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What becomes of others' tests, from pytest's report."""

import os
from pathlib import Path

import pytest

from tools.soft_npu import environment, foreign_tests, own_tests
from tools.soft_npu.environment import Device
from tools.soft_npu.foreign_tests import Suite
from tools.upstream import patch_tree

REPORT = """<testsuites><testsuite>
<testcase classname="t" name="good"/>
<testcase classname="t" name="here"><failure message="m">
E   RuntimeError: npu::a is not emulated by the software NPU</failure></testcase>
<testcase classname="t" name="there[4]"><failure message="m">
E   RuntimeError: Failed. See root cause above.</failure>
<system-out>(EngineCore pid=7) ERROR [core.py:3] ValueError: 4 heads at 0x7f
(EngineCore pid=7) ERROR [core.py:9] RuntimeError: later</system-out></testcase>
<testcase classname="t" name="there[8]"><failure message="m">
E   ValueError: 8 heads at 0x8a</failure></testcase>
<testcase classname="t" name="late"><failure message="m">
E   Failed: Timeout (&gt;120.0s) from pytest-timeout.</failure></testcase>
<testcase classname="t" name="bare"><error message="m">
E   ValidationError: 1 validation error for ModelConfig
E     Value error, Invalid repository ID or local directory: 'a/B'.</error></testcase>
<testcase classname="t" name="left"><skipped message="why"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def found(tmp_path: Path) -> patch_tree.Outcomes:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    return foreign_tests.read(path)


def test_kinds(found: patch_tree.Outcomes) -> None:
    assert {name: kind for name, (kind, _) in found.items()} == {
        "t.good": "passed",
        "t.here": "refused",
        "t.there[4]": "wrong",
        "t.there[8]": "wrong",
        "t.late": "slow",
        "t.bare": "missing",
        "t.left": "skipped",
    }


def test_reasons_do_not_depend_on_numbers(found: patch_tree.Outcomes) -> None:
    """And an engine's error is the first that its own process printed."""
    lines = foreign_tests.reasons(found).splitlines()[2:]
    assert lines[0] == "| 2 | wrong | ValueError: N heads at N | `t.there[4]` |"
    assert len(lines) == 4 and all(line.startswith("| 1 |") for line in lines[1:])
    assert any("| missing | Value error, Invalid repository ID" in x for x in lines)


def test_files_of_a_directory_share_a_process(tmp_path: Path) -> None:
    for name in ("ut/b/test_2.py", "ut/test_1.py", "ut/b/test_3.py", "ut/help.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    assert list(own_tests.directories(tmp_path, ["tests/ut"])) == [
        ("tests/ut", ["tests/ut/test_1.py"]),
        ("tests/ut/b", ["tests/ut/b/test_2.py", "tests/ut/b/test_3.py"]),
    ]
    with pytest.raises(SystemExit, match="no tests in tests/none"):
        list(own_tests.directories(tmp_path, ["tests/none"]))


def test_engines_may_take_as_long_as_their_file(tmp_path: Path) -> None:
    unit, engine = (
        own_tests.suite_of(tmp_path, Device.release, f"tests/{part}/_310p", {})
        for part in ("ut", "e2e")
    )
    assert unit.seconds_of_test < engine.seconds_of_test == engine.seconds
    assert unit.device == engine.device and unit.device.soc == "310P"


def test_trees_have_tools_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/theirs.py").touch()
    imports = "from tools import soft_npu, theirs"
    (tmp_path / "test_it.py").write_text(f"{imports}\n\ndef test_it():\n    pass\n")
    (tmp_path / "conftest.py").write_text(
        'def pytest_addoption(parser):\n    parser.addoption("--timeout")\n'
    )
    root = {"PYTHONPATH": str(Path(own_tests.__file__).parents[2])}
    monkeypatch.setattr(environment, "variables", lambda *_: os.environ | root)
    monkeypatch.setattr(environment, "add_packages", lambda *_: None)
    found = Suite(tmp_path, Device()).outcomes(["test_it.py"])
    assert {name: kind for name, (kind, _) in found.items()} == {
        "test_it.test_it": "passed"
    }
