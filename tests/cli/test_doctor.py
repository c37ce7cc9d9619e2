# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What `doctor` says of environments that do not serve, and what to do about them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.test_npu_base import FILES

# Each starts interpreters.
pytestmark = pytest.mark.long

OTHER = {
    "other_platform.py": """
def register():
    return "vllm.platforms.cpu.CpuPlatform"
""",
    "other_platform-1.dist-info/METADATA": """\
Metadata-Version: 2.1
Name: other-platform
Version: 1
""",
    "other_platform-1.dist-info/entry_points.txt": """
[vllm.platform_plugins]
other = other_platform:register
""",
}


def doctor(
    path: Path, files: dict[str, str], **variables: str
) -> tuple[int, dict[str, Any]]:
    """Run the command where a path has some packages, and nothing of vLLM's is set."""
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    command = [sys.executable, "-m", "vllm_ascend_ct.cli.main", "doctor", "--json"]
    result = subprocess.run(
        command,
        env={**clean, "PYTHONPATH": str(path), **variables},
        capture_output=True,
        text=True,
    )
    return result.returncode, json.loads(result.stdout)


def test_nothing_is_wrong(tmp_path: Path) -> None:
    status, found = doctor(tmp_path, {}, VLLM_PLUGINS="ascend_ct")
    assert status == 0 and found["problems"] == []
    serving = found["serving"]
    assert serving["platform"].endswith("EmulatedAscendCTPlatform")
    assert serving["config"].endswith("AscendCTConfig")
    assert serving["tested"].startswith("end to end")
    assert found["notes"] == [
        "The NPU operators are emulated on CPU, because torch_npu is not installed."
    ]


ANY = {"VLLM_ASCEND_CT_ANY_RELEASE": "1"}


@pytest.mark.parametrize(
    ("files", "variables", "what", "advice"),
    [
        pytest.param(
            {},
            {"VLLM_PLUGINS": "ascend_ct", "VLLM_ASCEND_CT_EMULATE": "0"},
            "torch_npu cannot be imported",
            "Install torch_npu and source CANN's set_env.sh",
            id="no torch_npu",
        ),
        pytest.param(
            FILES,
            {"VLLM_PLUGINS": "ascend_ct", "STUB_DEVICES": "0", **ANY},
            "no NPU answers",
            "Check `npu-smi info`",
            id="no device",
        ),
        pytest.param(
            OTHER,
            {"VLLM_PLUGINS": "ascend_ct,other"},
            "Only one platform plugin can be activated",
            "Name one of them in VLLM_PLUGINS",
            id="two platforms",
        ),
        pytest.param(
            FILES,
            {"VLLM_PLUGINS": "ascend_ct"},
            "does not support vllm-ascend 0.24.0",
            "Install vllm-ascend 0.24.0rc1",
            id="another release",
        ),
        pytest.param(
            {},
            {"VLLM_PLUGINS": "ascend_ct", "VLLM_TARGET_DEVICE": "cpu"},
            "not an Ascend platform",
            "unset VLLM_TARGET_DEVICE",
            id="target device",
        ),
        pytest.param(
            {},
            {},
            "VLLM_PLUGINS is unset",
            "Set VLLM_PLUGINS=ascend_ct",
            id="not asked for",
        ),
    ],
)
def test_one_problem(
    files: dict[str, str],
    variables: dict[str, str],
    what: str,
    advice: str,
    tmp_path: Path,
) -> None:
    status, found = doctor(tmp_path, files, **variables)
    (problem,) = found["problems"]
    assert status == 1 and what in problem and advice in problem
