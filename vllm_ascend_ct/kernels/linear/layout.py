# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which weights linear kernels are asked about."""

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from vllm_ascend_ct.compat import QUANTIZATION, is_ours


def foreign_layout() -> str | None:
    """Why the current model's weights are not for these kernels, or None.

    What upstream tells a kernel of a layer says nothing of its layout. Methods of other
    quantization that the platform serves do not ask.
    """
    vllm_config = get_current_vllm_config_or_none()
    quant_config = None if vllm_config is None else vllm_config.quant_config
    if quant_config is None or is_ours(quant_config):
        return None
    name = quant_config.get_name()
    if name in current_platform.supported_quantization:
        return None
    return f"weights as {name} lays them out; supported: {QUANTIZATION}"
