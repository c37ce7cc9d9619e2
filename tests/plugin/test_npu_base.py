# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform for NPU hosts, tested with a stand-in for torch_npu and vllm-ascend.

The stand-in behaves like vllm-ascend where it matters here: its platform imports a
module that registers its own compressed-tensors config, after general plugins have run,
and `VLLM_PLUGINS` filters its general plugins.
"""

from pathlib import Path

import pytest
import vllm

from tests.plugin.fresh import run, run_ok
from tests.plugin.test_register import OURS, STATE
from vllm_ascend_ct import releases

# These tests start interpreters.
pytestmark = pytest.mark.long

FILES = {
    "torch_npu/__init__.py": """
import os

class npu:
    device_count = staticmethod(lambda: int(os.environ.get("STUB_DEVICES", "1")))
""",
    "vllm_ascend/__init__.py": """
ran = []

def register():
    return "vllm_ascend.platform.NPUPlatform"

def register_connector():
    ran.append("connector")

def register_model():
    ran.append("model")

def register_broken():
    raise OSError("no service")
""",
    "vllm_ascend/utils.py": """
from enum import Enum

class AscendDeviceType(Enum):
    _310P = 2

def get_ascend_device_type():
    return AscendDeviceType._310P
""",
    "vllm_ascend/platform.py": """
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum

class NPUPlatform(CpuPlatform):
    _enum = PlatformEnum.OOT
    supported_quantization = ["compressed-tensors"]

    @classmethod
    def pre_register_and_update(cls, parser=None):
        import vllm_ascend.in_some_module
""",
    "vllm_ascend/in_some_module.py": """
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

@register_quantization_config("compressed-tensors")
class Theirs(QuantizationConfig):
    pass
""",
    "vllm_ascend-0.24.0.dist-info/METADATA": """\
Metadata-Version: 2.1
Name: vllm_ascend
Version: 0.24.0
""",
    "vllm_ascend-0.24.0.dist-info/entry_points.txt": """
[vllm.platform_plugins]
ascend = vllm_ascend:register

[vllm.general_plugins]
ascend_kv_connector = vllm_ascend:register_connector
ascend_model = vllm_ascend:register_model
ascend_service = vllm_ascend:register_broken
""",
}

# The stand-in has no release, and vllm-ascend does not run on this vLLM.
OURS_ALONE = {"VLLM_PLUGINS": "ascend_ct", "VLLM_ASCEND_CT_ANY_RELEASE": "1"}
SCRIPT = (
    STATE
    + """
import vllm_ascend
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm_ascend.platform import NPUPlatform

load_general_plugins()
current_platform.pre_register_and_update()
import vllm_ascend.in_some_module
current_platform.pre_register_and_update()
print(type(current_platform).__name__, isinstance(current_platform, NPUPlatform))
print(state())
print(sorted(vllm_ascend.ran))
"""
)


@pytest.fixture
def npu_host(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_alone(npu_host: Path) -> None:
    """Our platform extends vllm-ascend's, our config wins, and its plugins run once."""
    out = run_ok(
        SCRIPT
        + """
from vllm_ascend_ct.ops.soc import current_soc
print(current_soc().value)
""",
        path=npu_host,
        **OURS_ALONE,
    )
    assert out.splitlines() == [
        "NPUAscendCTPlatform True",
        OURS,
        "['connector', 'model']",
        "310P",
    ]


def test_beside_vllm_ascend(npu_host: Path) -> None:
    """vllm-ascend's platform stays, with the plugins that `VLLM_PLUGINS` names."""
    out = run_ok(
        SCRIPT,
        path=npu_host,
        VLLM_PLUGINS="ascend,ascend_ct,ascend_kv_connector",
        VLLM_ASCEND_CT_ANY_RELEASE="1",
    )
    assert out.splitlines() == ["NPUPlatform True", OURS, "['connector']"]


@pytest.mark.parametrize("plugins", ["ascend_ct", "ascend,ascend_ct"])
def test_release_that_is_not_supported(npu_host: Path, plugins: str) -> None:
    result = run(
        "from vllm.plugins import load_general_plugins\nload_general_plugins()",
        path=npu_host,
        VLLM_PLUGINS=plugins,
    )
    assert result.returncode != 0
    for part in (
        f"does not support vllm-ascend 0.24.0 on vLLM {vllm.__version__} (",
        f"Supported: {releases.describe(releases.served(on_npu=True))}. ",
        "Install vllm-ascend 0.24.0rc1 on vLLM 0.24.0, or ",
        "VLLM_ASCEND_CT_ANY_RELEASE=1",
    ):
        assert part in result.stderr


def test_plugin_that_fails_is_logged(npu_host: Path) -> None:
    """Like vLLM, log a plugin that fails, and run the others."""
    result = run(
        SCRIPT, path=npu_host, **OURS_ALONE, VLLM_LOGGING_STREAM="ext://sys.stderr"
    )
    assert result.stdout.splitlines()[-1] == "['connector', 'model']"
    assert "Failed to load plugin ascend_service" in result.stderr
    assert "OSError: no service" in result.stderr


@pytest.mark.parametrize("plugins", ["ascend_ct", "ascend,ascend_ct"])
def test_another_chip_than_installed_for(npu_host: Path, plugins: str) -> None:
    variables = {**OURS_ALONE, "VLLM_PLUGINS": plugins}
    result = run(SCRIPT, path=npu_host, **variables, VLLM_ASCEND_CT_SOC="A5")
    assert result.returncode != 0
    assert "(VLLM_ASCEND_CT_SOC=A5, vllm-ascend: 310P)" in result.stderr
    assert run(SCRIPT, path=npu_host, **variables, VLLM_ASCEND_CT_SOC="310P").stdout


@pytest.mark.parametrize("emulate", [None, "0"])
def test_no_device(npu_host: Path, emulate: str | None) -> None:
    """Never a silent fallback. Checked in the process that configures the engine."""
    result = run(
        SCRIPT,
        path=npu_host,
        **OURS_ALONE,
        VLLM_ASCEND_CT_EMULATE=emulate,
        STUB_DEVICES="0",
    )
    assert (result.returncode == 0) is (emulate == "0")
    if emulate is None:
        assert "no NPU answers (VLLM_ASCEND_CT_EMULATE=unset)" in result.stderr
        assert "Check `npu-smi info`" in result.stderr


def test_named_plugins_do_not_run_twice(npu_host: Path) -> None:
    variables = {**OURS_ALONE, "VLLM_PLUGINS": "ascend_ct,ascend_model"}
    out = run_ok(SCRIPT, path=npu_host, **variables)
    assert out.splitlines()[-1] == "['connector', 'model']"


def test_not_asked_for(npu_host: Path) -> None:
    out = run_ok(SCRIPT, path=npu_host, VLLM_PLUGINS="ascend,ascend_model")
    assert out.splitlines() == [
        "NPUPlatform True",
        "['Theirs', [], [], [], [], []]",
        "['model']",
    ]
