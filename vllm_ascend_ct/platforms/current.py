# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform that `VLLM_PLUGINS=ascend_ct` stands for on this machine.

Chosen while this module is imported: vLLM stops at an error here, whereas after an
error in the plugin function it would go on with its own CPU platform.
"""

import importlib
import importlib.util

from vllm_ascend_ct import envs, releases
from vllm_ascend_ct.errors import PlatformError

__all__ = ["AscendCTPlatform"]


def is_emulated() -> bool:
    """Choose between the two bases.

    Raises:
        PlatformError: The NPU base is due and something that it needs is missing.

    """
    emulate = envs.emulate()
    has_torch_npu = importlib.util.find_spec("torch_npu") is not None
    if emulate or (emulate is None and not has_torch_npu):
        return True
    for package in ("torch_npu", "vllm_ascend"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise PlatformError(
                f"{package} cannot be imported: {error}",
                where=f"{envs.EMULATE}={'unset' if emulate is None else '0'}",
                supported="a host with torch_npu, vllm-ascend and CANN's environment "
                "set, or emulation on CPU",
                remedy=f"Install {package} and source CANN's set_env.sh, or set "
                f"{envs.EMULATE}=1 to emulate the operators",
            ) from error
    return False


_emulated = is_emulated()
releases.check(on_npu=not _emulated)
if _emulated:
    from vllm_ascend_ct.platforms.emulated import (
        EmulatedAscendCTPlatform as AscendCTPlatform,
    )
else:
    from vllm_ascend_ct.platforms.npu import NPUAscendCTPlatform as AscendCTPlatform
