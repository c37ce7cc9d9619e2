# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What is registered where, and that nothing else of vLLM changes."""

import ast
import pickle

from vllm.model_executor.kernels import linear

from tests.plugin.fresh import run, run_ok
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
)

STATE = """
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import PlatformEnum

def state():
    oot = PlatformEnum.OOT
    return [
        get_quantization_config("compressed-tensors").__name__,
        [k.__name__ for k in linear._POSSIBLE_KERNELS.get(oot, [])],
        [k.__name__ for k in linear._POSSIBLE_INT8_KERNELS.get(oot, [])],
        [k.__name__ for k in linear._POSSIBLE_FP8_KERNELS.get(oot, [])],
        [k.__name__ for k in linear._POSSIBLE_MXFP8_KERNELS.get(oot, [])],
        [k.__name__ for k in linear._POSSIBLE_MXFP4_KERNELS.get(oot, [])],
    ]
"""
OURS = str(
    [
        "AscendCTConfig",
        ["AscendWNA16LinearKernel"],
        ["AscendInt8ScaledMMLinearKernel"],
        ["AscendFP8ScaledMMLinearKernel"],
        ["AscendMxfp8LinearKernel"],
        ["AscendMxfp4LinearKernel"],
    ]
)
# What vLLM and torch change themselves when plugins load and operators are defined.
HOUSEKEEPING = {
    "vllm.plugins.plugins_loaded",
    "torch.library._defs",
    "torch.library._impls",
    "torch.ops._dir",
}
_QUANTIZATION = "vllm.model_executor.layers.quantization"
WITH_THE_CONFIG = {
    f"{_QUANTIZATION}._CUSTOMIZED_METHOD_TO_QUANT_CONFIG",
    # A list that register_weight_loader_v2_supported_method extends.
    "vllm.model_executor.layers.linear.WEIGHT_LOADER_V2_SUPPORTED",
    f"{_QUANTIZATION}.compressed_tensors.transform.linear.WEIGHT_LOADER_V2_SUPPORTED",
}
THEIRS = "['CompressedTensorsConfig', [], [], [], [], []]"


def test_what_a_process_that_serves_registers() -> None:
    """Asks one process in the order of a worker's start, for a start takes long."""
    config = AscendCTConfig.from_config(
        {"config_groups": {}, "format": "pack-quantized"}
    )
    result = run(
        f"""
import pickle
# The config is unpickled by name, before plugins run.
config = pickle.loads({pickle.dumps(config)!r})
print(type(config).__name__, config.quant_format)
"""
        + STATE
        + """
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
import vllm_ascend_ct
# The platform alone is enough: some entry points skip general plugins.
current_platform.pre_register_and_update()
print(state())
# However often it is asked for, it is registered once.
current_platform.pre_register_and_update()
load_general_plugins()
vllm_ascend_ct.general_plugin()
print(state())

# No other config serves silently, whoever registers it after ours.
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
VllmConfig()
print("configured")

@register_quantization_config("compressed-tensors")
class Theirs(QuantizationConfig):
    pass

VllmConfig()
print("configured")
print(get_quantization_config("compressed-tensors").__name__)
""",
        VLLM_PLUGINS="ascend_ct",
    )
    unpickled = "AscendCTConfig pack-quantized"
    assert result.stdout.splitlines() == [unpickled, OURS, OURS, "configured"]
    assert "PlatformError: Another config took over" in result.stderr
    assert "(__main__.Theirs, VLLM_PLUGINS=ascend_ct)" in result.stderr


def test_installed_but_not_asked_for() -> None:
    out = run_ok(
        STATE
        + """
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
import sys
load_general_plugins()
print(type(current_platform).__name__)
print(state())
print([name for name in sys.modules if name.startswith("vllm_ascend_ct.")])
"""
    )
    assert out.splitlines() == ["CpuPlatform", THEIRS, "['vllm_ascend_ct.envs']"]


def test_nothing_of_vllm_is_patched() -> None:
    """No attribute of a module or class changes; registries only gain our entries."""
    out = run_ok(
        """
import sys, types
# So that asking for the platform, below, is all that resolves it.
import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.layers.linear as layers
import vllm.model_executor.layers.quantization as quantization
import vllm.model_executor.models.qwen2
import vllm.v1.engine.core
from vllm.platforms import PlatformEnum, current_platform
quantization.get_quantization_config("compressed-tensors")

def copied(value, depth=2):
    # Containers by content, two levels deep; the rest by identity.
    if depth and isinstance(value, dict):
        return {k: copied(v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, (list, set)):
        return [copied(v, depth - 1) for v in value]
    return id(value)

def snapshot():
    seen = {}
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(("vllm.", "torch.", "compressed_tensors.")):
            continue
        for key, value in vars(module).items():
            if isinstance(value, types.ModuleType):
                continue
            seen[name, key] = copied(value)
            if isinstance(value, type) and value.__module__ == name:
                seen.update({(name, key, k): copied(v) for k, v in vars(value).items()})
    return seen

before = snapshot()
known = {name for name, *_ in before}
from vllm.plugins import load_general_plugins
load_general_plugins()
current_platform.pre_register_and_update()
after = snapshot()
print({".".join(k) for k in before.keys() | after.keys()
       if k[0] in known and before.get(k) != after.get(k)})
""",
        VLLM_PLUGINS="ascend_ct",
    )
    changed: set[str] = ast.literal_eval(out)
    kernels = "vllm.model_executor.kernels.linear"
    kinds = "", "INT8_", "FP8_", "MXFP8_", "MXFP4_"
    expected = {f"{kernels}._POSSIBLE_{kind}KERNELS" for kind in kinds}
    if hasattr(linear, "_POSSIBLE_KERNELS_BY_TYPE"):
        expected.add(f"{kernels}._POSSIBLE_KERNELS_BY_TYPE")
    assert changed - HOUSEKEEPING == expected | WITH_THE_CONFIG
