# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform that `VLLM_PLUGINS=ascend_ct` selects on this machine.

The choice is made while this module is imported: an error here stops vLLM, whereas an
error in the plugin function would make it fall back to its own CPU platform.
"""

import importlib
import importlib.util

from vllm_ascend_ct import envs, releases
from vllm_ascend_ct.errors import PlatformError

__all__ = ["AscendCTPlatform"]


def is_emulated() -> bool:
    """Choose between emulated operators and vllm-ascend.

    Returns:
        True to emulate: if requested, or by default if torch_npu is not installed.

    Raises:
        PlatformError: vllm-ascend should run the engine, and it or torch_npu cannot be
            imported.

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
                supported="a host with torch_npu and vllm-ascend, and CANN's "
                "environment set, or emulation on CPU",
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
