# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Everything this package registers with vLLM, all through public registries."""

import os
from functools import cache
from typing import TYPE_CHECKING

from vllm_ascend_ct import ascend_base, envs, releases
from vllm_ascend_ct.errors import PlatformError

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


@cache
def register() -> None:
    """Register operators, kernels and the quantization config, once per process.

    Raises:
        PlatformError: vLLM selected an in-tree platform, which would never use what is
            registered here; the installed releases are not supported; or another
            plugin's config serves compressed-tensors models.

    """
    from vllm.platforms import PlatformEnum, current_platform

    if current_platform._enum is not PlatformEnum.OOT:
        raise PlatformError(
            f"vLLM runs on {type(current_platform).__name__}, which is not an Ascend "
            "platform",
            where=f"VLLM_PLUGINS={','.join(envs.requested_plugins())}, "
            f"VLLM_TARGET_DEVICE={os.environ.get('VLLM_TARGET_DEVICE', 'unset')}",
            supported="ascend_ct alone, or ascend,ascend_ct with vllm-ascend",
            remedy="Name ascend only if vllm-ascend is installed, and unset "
            "VLLM_TARGET_DEVICE, which disables platform plugins",
        )
    # Only this package's own platforms have it.
    prepare = getattr(type(current_platform), "prepare_ascend_ct", None)
    if prepare is not None:
        prepare()
    else:
        releases.check(on_npu=True)
        ascend_base.prepare_process(load_plugins=False)
    register_quantization_config()
    register_linear_kernels()
    check_in_charge()


def register_quantization_config() -> None:
    """Register `AscendCTConfig` for "compressed-tensors"."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_ascend_ct.compat import QUANTIZATION
    from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
        AscendCTConfig,
    )

    register_quantization_config(QUANTIZATION)(AscendCTConfig)


def check_in_charge(quant_config: "QuantizationConfig | None" = None) -> None:
    """Check that this package's config serves "compressed-tensors".

    vLLM silently uses the class that was registered last.

    Args:
        quant_config: The quantization config of the engine that is being configured.

    Raises:
        PlatformError: Another plugin's config would serve.

    """
    from vllm.model_executor.layers.quantization import get_quantization_config

    from vllm_ascend_ct.compat import QUANTIZATION, is_ours
    from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
        AscendCTConfig,
    )

    serving: type = get_quantization_config(QUANTIZATION)
    if is_ours(quant_config):
        serving = type(quant_config)
    if not issubclass(serving, AscendCTConfig):
        raise PlatformError(
            "Another config took over compressed-tensors models from vllm-ascend-ct",
            where=f"{serving.__module__}.{serving.__qualname__}, "
            f"VLLM_PLUGINS={','.join(envs.requested_plugins())}",
            supported=releases.describe(
                releases.served(on_npu=True) + releases.served(on_npu=False)
            ),
            remedy="Remove the plugin that registers it, or leave ascend_ct out of "
            "VLLM_PLUGINS to serve with it",
        )


def register_linear_kernels() -> None:
    """Add the NPU kernels to upstream's kernel selection."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms import PlatformEnum

    from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
        AscendWNA16LinearKernel,
    )
    from vllm_ascend_ct.kernels.linear.mxfp4.ascend import AscendMxfp4LinearKernel
    from vllm_ascend_ct.kernels.linear.mxfp8.ascend import AscendMxfp8LinearKernel
    from vllm_ascend_ct.kernels.linear.scaled_mm.ascend import (
        AscendInt8ScaledMMLinearKernel,
    )
    from vllm_ascend_ct.kernels.linear.scaled_mm.ascend_fp8 import (
        AscendFP8ScaledMMLinearKernel,
    )

    register_linear_kernel(AscendWNA16LinearKernel, PlatformEnum.OOT, "mp")
    register_linear_kernel(AscendInt8ScaledMMLinearKernel, PlatformEnum.OOT, "int8")
    register_linear_kernel(AscendFP8ScaledMMLinearKernel, PlatformEnum.OOT, "fp8")
    register_linear_kernel(AscendMxfp8LinearKernel, PlatformEnum.OOT, "mxfp8")
    register_linear_kernel(AscendMxfp4LinearKernel, PlatformEnum.OOT, "mxfp4")
