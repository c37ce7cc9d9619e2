# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which platform and config a process gets where the real vllm-ascend is installed.

As `tests/plugin/test_npu_base.py` over a stand-in.
"""

import importlib.metadata

import pytest

from tests.plugin.fresh import run_ok
from tests.plugin.test_register import OURS, STATE

pytestmark = pytest.mark.vllm_ascend

# What vLLM does first in each kind of process; imports may come before and after.
STEPS = {
    "main": "current_platform.pre_register_and_update()",
    "engine core and workers": "load_general_plugins()",
    "import": "import vllm_ascend.quantization.compressed_tensors_config",
    "import all": "import vllm_ascend.ops, vllm_ascend.quantization.modelslim_config",
}
REPORT = (
    STATE
    + """
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
{steps}
from vllm_ascend.platform import NPUPlatform
platform = type(current_platform)
print("platform", platform.__name__, issubclass(platform, NPUPlatform))
print("state", state())
from vllm.model_executor.models import ModelRegistry
print("models", sum(
    "vllm_ascend" in str(getattr(model, "module_name", ""))
    for model in ModelRegistry.models.values()))
import sys
print("ours", any(name.startswith("vllm_ascend_ct.register") for name in sys.modules))
"""
)


def report(steps: list[str], plugins: str | None) -> dict[str, str]:
    script = REPORT.format(steps="\n".join(steps))
    out = run_ok(script, VLLM_PLUGINS=plugins, VLLM_ASCEND_CT_EMULATE="0")
    lines = (line.partition(" ") for line in out.splitlines())
    return {
        name: value
        for name, _, value in lines
        if name in ("platform", "state", "models", "ours")
    }


def theirs() -> str:
    """All of vllm-ascend's plugins, as `VLLM_PLUGINS` has to name them."""
    names = ["ascend"]
    for entry in importlib.metadata.entry_points(group="vllm.general_plugins"):
        if entry.value.startswith("vllm_ascend:"):
            names.append(entry.name)
    assert len(names) > 1
    return ",".join(names)


ORDERS = [
    ("main", "import"),
    ("import", "main"),
    ("engine core and workers", "import all"),
    ("import all", "engine core and workers"),
]


@pytest.mark.parametrize("order", ORDERS, ids=", then ".join)
def test_alone(order: tuple[str, str]) -> None:
    """Whatever is first: our platform is vllm-ascend's, our config outlasts its."""
    got = report([STEPS[step] for step in order], "ascend_ct")
    assert got["platform"] == "NPUAscendCTPlatform True"
    assert got["state"] == OURS


def test_beside_vllm_ascend() -> None:
    got = report(list(STEPS.values()), f"{theirs()},ascend_ct")
    assert got["platform"] == "NPUPlatform True"
    assert got["state"] == OURS


def test_its_general_plugins_ran() -> None:
    """As many of its models are registered as without us."""
    steps = [STEPS["engine core and workers"], STEPS["main"]]
    without, with_us = report(steps, theirs()), report(steps, "ascend_ct")
    assert int(without["models"]) == int(with_us["models"]) > 0


@pytest.mark.parametrize("plugins", [None, theirs], ids=["unset", "theirs"])
def test_not_asked_for(plugins: object) -> None:
    """Nothing of ours is in, and vllm-ascend serves with its own config."""
    names = theirs() if plugins else None
    got = report(list(STEPS.values()), names)
    assert got["platform"] == "NPUPlatform True"
    assert got["ours"] == "False" and got["state"] != OURS
    assert "AscendCompressedTensorsConfig" in got["state"]
