# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Everything this package uses of vllm-ascend, which runs the engine on NPU hosts.

vllm-ascend is not installed elsewhere, so functions import it when they are called.
"""

import os
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.soc import Soc, current_soc, requested_soc, set_default_soc

logger = init_logger("vllm.ascend_ct.ascend_base")


def prepare_process(load_plugins: bool) -> None:
    """Prepare this process for this package's registrations.

    Args:
        load_plugins: Whether to run vllm-ascend's general plugins, which
            `VLLM_PLUGINS=ascend_ct` filters out.

    Raises:
        PlatformError: `VLLM_ASCEND_CT_SOC` differs from the chip that vllm-ascend was
            installed for.

    """
    from vllm_ascend.platform import NPUPlatform

    _use_installed_chip()
    if load_plugins:
        _load_general_plugins()
    # This imports the module that registers vllm-ascend's config. The last registration
    # wins, so it has to come before ours, and vLLM calls it in one process only.
    NPUPlatform.pre_register_and_update()


def _use_installed_chip() -> None:
    """Use the operator limits of the chip that vllm-ascend was installed for."""
    from vllm_ascend.utils import get_ascend_device_type

    # Querying the device instead would initialize it.
    installed = Soc(get_ascend_device_type().name.removeprefix("_"))
    if requested_soc() not in (None, installed):
        raise PlatformError(
            f"{envs.SOC} names a different chip from the one that vllm-ascend was "
            "installed for",
            where=f"{envs.SOC}={os.environ[envs.SOC]}, vllm-ascend: {installed.value}",
            supported=f"{envs.SOC} with emulated operators only",
            remedy=f"Unset {envs.SOC}, or install vllm-ascend for that chip "
            "(SOC_VERSION)",
        )
    set_default_soc(installed)


def _load_general_plugins() -> None:
    """Run vllm-ascend's general plugins, except those that vLLM itself runs."""
    requested = envs.requested_plugins()
    for entry_point in entry_points(group="vllm.general_plugins"):
        distribution = entry_point.dist.name if entry_point.dist else ""
        if (
            distribution.replace("_", "-") == "vllm-ascend"
            and entry_point.name not in requested
        ):
            try:
                entry_point.load()()
            except Exception:
                logger.exception("Failed to load plugin %s", entry_point.name)


def init_config(vllm_config: object) -> None:
    """Initialize vllm-ascend's settings, as its engine does at startup."""
    from vllm_ascend.ascend_config import init_ascend_config

    init_ascend_config(vllm_config)


def prepare_worker(vllm_config: Any) -> None:
    """Set up a process like vllm-ascend's worker does before it joins its ranks.

    Does nothing without vllm-ascend.
    """
    if not runs_on_vllm_ascend():
        return
    from vllm_ascend import ops
    from vllm_ascend.utils import adapt_patch, register_ascend_customop

    adapt_patch()
    ops.register_dummy_fusion_op()
    register_ascend_customop(vllm_config)
    init_config(vllm_config)


def join_groups(vllm_config: Any) -> None:
    """Create vllm-ascend's own groups of ranks, in addition to vLLM's.

    Does nothing without vllm-ascend.
    """
    if not runs_on_vllm_ascend():
        return
    from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel

    # vllm-ascend takes the second argument since 0.30.
    given = vllm_config.parallel_config, getattr(vllm_config, "engram_config", None)
    count = len(signature(init_ascend_model_parallel).parameters)
    init_ascend_model_parallel(*given[:count])


def prefers_nz() -> bool:
    """Whether vllm-ascend is configured to store quantized weights in FRACTAL_NZ."""
    if not runs_on_vllm_ascend():
        return False
    from vllm_ascend.ascend_config import get_ascend_config

    return bool(get_ascend_config().weight_nz_mode)


def fuses_norms(dtype: torch.dtype) -> bool:
    """Whether vllm-ascend's graph passes may fuse a norm with static quantization.

    The passes match vllm-ascend's operator `quantize` and pass its arguments, in the
    model's dtype, to `npu_add_rms_norm_quant`. For float16 that operator's
    documentation requires other dtypes.

    Args:
        dtype: The model's dtype.

    """
    if not runs_on_vllm_ascend() or dtype != torch.bfloat16:
        return False
    # The import registers the operator.
    from vllm_ascend.ops import register_custom_ops  # noqa: F401

    return True


def runs_on_vllm_ascend() -> bool:
    """Whether vllm-ascend runs the engine in this process."""
    from vllm.platforms import current_platform

    return current_platform.device_type == "npu"


def graph_key() -> dict[str, dict[str, object]]:
    """Fields that keep compiled graphs for different chips and layouts apart."""
    key = {"soc": current_soc().value, "emulated": not runs_on_vllm_ascend()}
    return {"ascend_ct": {**key, "layouts": layouts.requested()}}
