# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's own quantization tests, with the emulated operators."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools.upstream import patch_tree
from tools.upstream.patch_series import target_of

pytestmark = pytest.mark.vllm_ascend

# The release that runs here, and the sha256 of its source distribution.
SOURCE = {"0.23.0": "a58db76eaffcf328b13b315a0db3a57d381a8947d01057ddcefe4ad02372b242"}
# Operators that are not emulated, because nothing here uses them.
EXPECTED = {
    "test_w4a4_flatquant.TestW4A4FlatQuantDynamicWithNpu": "npu_kronecker_quant",
    "test_w4a4_laos_dynamic.TestAscendW4A4LaosDynamicLinearMethodWithNpu": (
        "dst_type=16; emulated: int8"
    ),
    # vllm-ascend registers it for devices only.
    "test_w8a8_static.TestAscendW8A8LinearMethodWithNpu": "vllm::quantize",
}


def test_all_but_what_is_not_emulated(tmp_path: Path) -> None:
    target = replace(target_of("vllm-ascend"), versions=SOURCE, stack="vllm_ascend")
    tree = patch_tree.pristine(target, *SOURCE).resolve()
    report = tmp_path / "report.xml"
    path = os.pathsep.join([str(tree), os.environ["PYTHONPATH"], str(tmp_path)])
    # vllm-ascend's tree has its own package `tests`.
    plugin = Path(__file__).with_name("without_npu.py")
    (tmp_path / plugin.name).write_text(plugin.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml"]
    command += ["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", plugin.stem, f"--junitxml={report}", "tests/ut/quantization"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    result = subprocess.run(
        command,
        cwd=tree,
        env={**variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert report.exists(), result.stdout[-3000:]
    outcomes = patch_tree.outcomes(report)
    failed = {name: text for name, (kind, text) in outcomes.items() if kind == "failed"}
    for name, text in failed.items():
        expected = [reason for known, reason in EXPECTED.items() if known in name]
        assert expected and expected[0] in text, (name, text[-2000:])
    assert len(failed) == len(EXPECTED)
    assert sum(kind == "passed" for kind, _ in outcomes.values()) > 200
