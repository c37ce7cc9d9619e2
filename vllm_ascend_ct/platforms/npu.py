# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform for NPU hosts."""

from vllm_ascend.platform import NPUPlatform

from vllm_ascend_ct import ascend_base, envs
from vllm_ascend_ct.ops.soc import set_default_soc
from vllm_ascend_ct.platforms.interface import AscendCTPlatformMixin


class NPUAscendCTPlatform(AscendCTPlatformMixin, NPUPlatform):
    """vllm-ascend's platform with our compressed-tensors config and kernels."""

    @classmethod
    def prepare_process(cls) -> None:
        """Run what `VLLM_PLUGINS` keeps vLLM from running; torch_npu has the rest."""
        set_default_soc(ascend_base.soc())
        ascend_base.load_general_plugins(loaded=envs.requested_plugins())
