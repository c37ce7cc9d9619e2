# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Everything that is taken from vllm-ascend, the production base.

vllm-ascend is installed on NPU hosts only; each function says what happens without it.
"""

import importlib
import importlib.util
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import torch

from vllm_ascend_ct.ops.soc import Soc

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearMethodBase


def is_installed() -> bool:
    """Whether vllm-ascend can be imported."""
    return importlib.util.find_spec("vllm_ascend") is not None


def soc() -> Soc:
    """The chip that vllm-ascend was installed for."""
    from vllm_ascend.utils import get_ascend_device_type

    return Soc(get_ascend_device_type().name.removeprefix("_"))


def import_compressed_tensors_config() -> None:
    """Let vllm-ascend register its own compressed-tensors config, if it has one.

    It does so when the module is first imported, and the last registration counts: ours
    has to follow.
    """
    module = "vllm_ascend.quantization.compressed_tensors_config"
    if is_installed() and importlib.util.find_spec(module) is not None:
        importlib.import_module(module)


def load_general_plugins(loaded: list[str]) -> None:
    """Run vllm-ascend's general plugins, which `VLLM_PLUGINS` filtered out.

    Args:
        loaded: Names in `VLLM_PLUGINS`; vLLM runs those itself.

    """
    for entry_point in entry_points(group="vllm.general_plugins"):
        distribution = entry_point.dist.name if entry_point.dist else ""
        if (
            distribution.replace("_", "-") == "vllm-ascend"
            and entry_point.name not in loaded
        ):
            entry_point.load()()


def maybe_nz(weight: torch.Tensor) -> torch.Tensor:
    """Cast a `[K, N]` weight to FRACTAL_NZ if vllm-ascend is configured to.

    Without an NPU, and with its `weight_nz_mode` 0, the weight comes back as it is.
    """
    if weight.device.type != "npu":
        return weight
    from vllm_ascend.utils import maybe_trans_nz

    cast: torch.Tensor = maybe_trans_nz(weight.contiguous())
    return cast


def unquantized_linear_method() -> "LinearMethodBase | None":
    """vllm-ascend's method for layers that are not quantized; None off the NPU."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "npu":
        return None
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    method: LinearMethodBase = AscendUnquantizedLinearMethod()
    return method
