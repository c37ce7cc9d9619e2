# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Everything that is taken from vllm-ascend, the production base.

It is installed on NPU hosts only, so everything is imported where it is used.
"""

import importlib
import importlib.util
from importlib.metadata import entry_points

from vllm_ascend_ct import envs
from vllm_ascend_ct.ops.soc import Soc, set_default_soc


def is_installed() -> bool:
    """Whether vllm-ascend can be imported."""
    return importlib.util.find_spec("vllm_ascend") is not None


def prepare_process() -> None:
    """Do in this process what has to happen before our own registrations."""
    from vllm_ascend.utils import get_ascend_device_type

    # The chip that vllm-ascend was installed for; asking the device would start it.
    set_default_soc(Soc(get_ascend_device_type().name.removeprefix("_")))
    _load_general_plugins()
    # Importing this module registers vllm-ascend's config, and the last one counts.
    module = "vllm_ascend.quantization.compressed_tensors_config"
    if importlib.util.find_spec(module) is not None:
        importlib.import_module(module)


def _load_general_plugins() -> None:
    """Run vllm-ascend's general plugins that `VLLM_PLUGINS` filtered out."""
    requested = envs.requested_plugins()
    for entry_point in entry_points(group="vllm.general_plugins"):
        distribution = entry_point.dist.name if entry_point.dist else ""
        if (
            distribution.replace("_", "-") == "vllm-ascend"
            and entry_point.name not in requested
        ):
            entry_point.load()()


def prefers_nz() -> bool:
    """Whether vllm-ascend is configured to hold quantized weights in FRACTAL_NZ."""
    if not serves():
        return False
    from vllm_ascend.ascend_config import get_ascend_config

    return bool(get_ascend_config().weight_nz_mode)


def serves() -> bool:
    """Whether vllm-ascend is what this process runs on."""
    from vllm.platforms import current_platform

    return current_platform.device_type == "npu"
