# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Everything that is taken from vllm-ascend, the production base.

It is installed on NPU hosts only, so everything is imported where it is used.
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
    """Do in this process what has to happen before our own registrations.

    Args:
        load_plugins: Whether to run vllm-ascend's general plugins, which
            `VLLM_PLUGINS=ascend_ct` filters out.

    Raises:
        PlatformError: The environment names another chip than vllm-ascend.

    """
    from vllm_ascend.platform import NPUPlatform

    _use_installed_chip()
    if load_plugins:
        _load_general_plugins()
    # Registers vllm-ascend's config while a module is imported. The last registration
    # counts, so that has to happen before ours; vLLM calls it in one process only.
    NPUPlatform.pre_register_and_update()


def _use_installed_chip() -> None:
    """Take the limits of the chip that vllm-ascend was installed for."""
    from vllm_ascend.utils import get_ascend_device_type

    # Asking the device instead would start it.
    installed = Soc(get_ascend_device_type().name.removeprefix("_"))
    if requested_soc() not in (None, installed):
        raise PlatformError(
            f"{envs.SOC} names another chip than the one that vllm-ascend was "
            "installed for",
            where=f"{envs.SOC}={os.environ[envs.SOC]}, vllm-ascend: {installed.value}",
            supported=f"{envs.SOC} where the operators are emulated",
            remedy=f"Unset {envs.SOC}, or install vllm-ascend for the chip that it "
            "names (SOC_VERSION)",
        )
    set_default_soc(installed)


def _load_general_plugins() -> None:
    """Run vllm-ascend's general plugins, but for those that vLLM runs itself."""
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
    """Read vllm-ascend's settings, as its engine does first."""
    from vllm_ascend.ascend_config import init_ascend_config

    init_ascend_config(vllm_config)


def prepare_worker(vllm_config: Any) -> None:
    """Do what vllm-ascend's worker does before it has ranks; nothing elsewhere."""
    if not runs_on_vllm_ascend():
        return
    from vllm_ascend import ops
    from vllm_ascend.utils import adapt_patch, register_ascend_customop

    adapt_patch()
    ops.register_dummy_fusion_op()
    register_ascend_customop(vllm_config)
    init_config(vllm_config)


def join_groups(vllm_config: Any) -> None:
    """Make vllm-ascend's own groups of ranks, beside vLLM's; none elsewhere."""
    if not runs_on_vllm_ascend():
        return
    from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel

    # The second since 0.30.
    given = vllm_config.parallel_config, getattr(vllm_config, "engram_config", None)
    count = len(signature(init_ascend_model_parallel).parameters)
    init_ascend_model_parallel(*given[:count])


def prefers_nz() -> bool:
    """Whether vllm-ascend is configured to hold quantized weights in FRACTAL_NZ."""
    if not runs_on_vllm_ascend():
        return False
    from vllm_ascend.ascend_config import get_ascend_config

    return bool(get_ascend_config().weight_nz_mode)


def fuses_norms(dtype: torch.dtype) -> bool:
    """Whether vllm-ascend's passes may have norms quantize to given scales.

    They look for its operator `quantize`, and hand what it is given, in the model's
    dtype, to `npu_add_rms_norm_quant`, which for float16 documents others.
    """
    if not runs_on_vllm_ascend() or dtype != torch.bfloat16:
        return False
    # Registers the operator.
    from vllm_ascend.ops import register_custom_ops  # noqa: F401

    return True


def runs_on_vllm_ascend() -> bool:
    """Whether vllm-ascend is what this process runs on."""
    from vllm.platforms import current_platform

    return current_platform.device_type == "npu"


def graph_key() -> dict[str, dict[str, object]]:
    """What tells graphs of this process from those of other chips and layouts."""
    key = {"soc": current_soc().value, "emulated": not runs_on_vllm_ascend()}
    return {"ascend_ct": {**key, "layouts": layouts.requested()}}
