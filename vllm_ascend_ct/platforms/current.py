# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform that `VLLM_PLUGINS=ascend_ct` stands for on this machine.

Chosen while this module is imported: vLLM stops at an error here, whereas after an
error in the plugin function it would go on with its own CPU platform.
"""

import importlib.util

from vllm_ascend_ct import ascend_base, envs
from vllm_ascend_ct.errors import PlatformError

__all__ = ["AscendCTPlatform"]

_SUPPORTED = "an NPU host with torch_npu and vllm-ascend, or emulation on CPU"
_EMULATE_INSTEAD = f"set {envs.EMULATE}=1 to emulate the operators on CPU"


def is_emulated() -> bool:
    """Choose between the two bases.

    Raises:
        PlatformError: The NPU base is due and cannot run.

    """
    emulate = envs.emulate()
    has_torch_npu = importlib.util.find_spec("torch_npu") is not None
    if emulate or (emulate is None and not has_torch_npu):
        return True
    where = f"{envs.EMULATE}={'unset' if emulate is None else int(emulate)}"
    if not has_torch_npu or not ascend_base.is_installed():
        missing = "vllm-ascend" if has_torch_npu else "torch_npu"
        raise PlatformError(
            f"{missing} is not installed",
            where=where,
            supported=_SUPPORTED,
            remedy=f"Install {missing}, or {_EMULATE_INSTEAD}",
        )
    import torch_npu

    if torch_npu.npu.device_count() == 0:
        raise PlatformError(
            "torch_npu is installed but no NPU answers",
            where=where,
            supported=_SUPPORTED,
            remedy="Check `npu-smi info`, the driver, ASCEND_RT_VISIBLE_DEVICES and "
            f"the devices mapped into the container, or {_EMULATE_INSTEAD}",
        )
    return False


if is_emulated():
    from vllm_ascend_ct.platforms.emulated import (
        EmulatedAscendCTPlatform as AscendCTPlatform,
    )
else:
    from vllm_ascend_ct.platforms.npu import NPUAscendCTPlatform as AscendCTPlatform
