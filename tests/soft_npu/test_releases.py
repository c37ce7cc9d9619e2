# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which config is in charge where another release of vllm-ascend is installed."""

import subprocess
import sys

import pytest

from tools.soft_npu import environment
from tools.soft_npu.suite import CHECKPOINTS
from vllm_ascend_ct import releases

pytestmark = pytest.mark.soft_npu
PLUGINS = ["ascend_ct", "ascend,ascend_ct"]
# As an engine is configured, and as its other processes begin.
SCRIPT = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

if sys.argv[2] == "main":
    config = EngineArgs(sys.argv[1], max_model_len=128).create_engine_config()
    print("SERVES", type(config.quant_config).__name__)
else:
    load_general_plugins()
    print("SERVES", get_quantization_config("compressed-tensors").__name__)
"""


def start(release: str, plugins: str, process: str) -> tuple[int, str]:
    """Exit code and output of a process."""
    variables = environment.variables(environment.Device(release))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(CHECKPOINTS / "dense-w4a16"), process],
        env=variables | {"VLLM_PLUGINS": plugins, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("process", ["main", "other"])
@pytest.mark.parametrize("plugins", PLUGINS)
def test_supported(plugins: str, process: str) -> None:
    code, output = start("0.23.0", plugins, process)
    assert code == 0, output[-3000:]
    assert "SERVES AscendCTConfig" in output


@pytest.mark.long
@pytest.mark.parametrize("process", ["main", "other"])
@pytest.mark.parametrize("plugins", PLUGINS)
def test_not_supported(plugins: str, process: str) -> None:
    """There vllm-ascend's config would serve without a word."""
    code, output = start("0.30.0rc2", plugins, process)
    assert code != 0 and "SERVES" not in output
    assert "PlatformError" in output and "vllm-ascend 0.30.0rc2" in output
    assert all(str(known) in output for known in releases.ON_NPU)
