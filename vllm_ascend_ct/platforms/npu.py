# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform for NPU hosts."""

from typing import TYPE_CHECKING

import torch_npu
from vllm_ascend.platform import NPUPlatform

from vllm_ascend_ct import ascend_base, envs
from vllm_ascend_ct.ascend_base import kv_cache
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.platforms.interface import AscendCTPlatformMixin

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class NPUAscendCTPlatform(AscendCTPlatformMixin, NPUPlatform):
    """vllm-ascend's platform with our compressed-tensors config and kernels."""

    @classmethod
    def prepare_ascend_ct(cls) -> None:
        ascend_base.prepare_process(load_plugins=True)

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Select an int8 KV cache, if the checkpoint has scales for it."""
        super().check_and_update_config(vllm_config)
        if getattr(vllm_config.quant_config, "int8_kv_cache", None):
            kv_cache.choose_dtype(vllm_config)

    @classmethod
    def announce(cls) -> None:
        super().announce()
        # Check only in the process that configures the engine: an API server process or
        # a Ray head may run without a device.
        if envs.emulate() is None and torch_npu.npu.device_count() == 0:
            raise PlatformError(
                "torch_npu is installed but no NPU answers",
                where=f"{envs.EMULATE}=unset",
                supported="a host with an NPU, or emulation on CPU",
                remedy="Check `npu-smi info`, the driver, ASCEND_RT_VISIBLE_DEVICES "
                f"and the devices mapped into the container, or set {envs.EMULATE}=1 "
                f"to emulate; {envs.EMULATE}=0 skips this check",
            )
