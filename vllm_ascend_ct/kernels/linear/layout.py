# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Check that a kernel is asked about compressed-tensors weights."""

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from vllm_ascend_ct.compat import QUANTIZATION, is_ours


def foreign_layout() -> str | None:
    """Why these kernels do not support the current model's weight layout, or None.

    The config that upstream passes to a kernel does not describe the weight layout, so
    look at the model's quantization method. Methods that the platform supports with
    kernels of their own never ask these.
    """
    vllm_config = get_current_vllm_config_or_none()
    quant_config = None if vllm_config is None else vllm_config.quant_config
    if quant_config is None or is_ours(quant_config):
        return None
    name = quant_config.get_name()
    if name in current_platform.supported_quantization:
        return None
    return f"weights in the layout of {name}; supported: {QUANTIZATION}"
