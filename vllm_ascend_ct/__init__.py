# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Serve compressed-tensors models on Ascend NPUs with stock vLLM.

vLLM calls the two functions below, each several times and in every process. Both
do nothing unless `VLLM_PLUGINS` names `ascend_ct`.
"""

__version__ = "0.1.0"

PLUGIN_NAME = "ascend_ct"


def platform_plugin() -> str | None:
    """Name the platform class to vLLM (group `vllm.platform_plugins`).

    Returns:
        None when the plugin was not asked for, or when vllm-ascend's platform was
        asked for as well: then that one serves and only `general_plugin` acts.

    """
    from vllm_ascend_ct import envs

    plugins = envs.requested_plugins()
    if PLUGIN_NAME not in plugins or "ascend" in plugins:
        return None
    # vLLM goes on with another platform when this function raises, so whatever can
    # fail is left to the import of the module named here.
    return "vllm_ascend_ct.platforms.current.AscendCTPlatform"


def general_plugin() -> None:
    """Register config, kernels and operators (group `vllm.general_plugins`)."""
    from vllm_ascend_ct import envs

    if PLUGIN_NAME in envs.requested_plugins():
        from vllm_ascend_ct.register import register

        register()
