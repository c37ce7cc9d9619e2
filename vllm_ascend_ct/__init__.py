# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Serve compressed-tensors models on Ascend NPUs with stock vLLM.

vLLM calls the two functions below several times in every process. Both do nothing
unless `VLLM_PLUGINS` names `ascend_ct`.
"""

__version__ = "0.1.0"

PLUGIN_NAME = "ascend_ct"


def platform_plugin() -> str | None:
    """Tell vLLM which platform class to use (group `vllm.platform_plugins`).

    Returns:
        Qualified name of the class. None if `VLLM_PLUGINS` does not name this plugin,
        or also names vllm-ascend's: vllm-ascend's platform then runs the engine, and
        only `general_plugin` of this package has an effect.

    """
    from vllm_ascend_ct import envs

    plugins = envs.requested_plugins()
    if PLUGIN_NAME not in plugins or "ascend" in plugins:
        return None
    # If this function raised, vLLM would silently choose another platform. Everything
    # that can fail happens when vLLM imports the module named here.
    return "vllm_ascend_ct.platforms.current.AscendCTPlatform"


def general_plugin() -> None:
    """Register config, kernels and operators (group `vllm.general_plugins`)."""
    from vllm_ascend_ct import envs

    if PLUGIN_NAME in envs.requested_plugins():
        from vllm_ascend_ct.register import register

        register()
