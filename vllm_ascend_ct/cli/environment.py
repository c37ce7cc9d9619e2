# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the commands need of the environment that they are called in."""

import importlib.util
import os
import sys

from vllm_ascend_ct import PLUGIN_NAME
from vllm_ascend_ct.errors import PlatformError


def require_vllm() -> None:
    """Refuse an environment without vLLM.

    Raises:
        PlatformError: vLLM is not installed.

    """
    if importlib.util.find_spec("vllm") is None:
        raise PlatformError(
            "vLLM is not installed in this environment",
            where=sys.executable,
            supported="the environment that serves, or will",
            remedy="Install vLLM, or call the command of the environment that has it",
        )


def with_plugin() -> list[str]:
    """The names in `VLLM_PLUGINS`, this package's among them."""
    names = [n for n in os.environ.get("VLLM_PLUGINS", "").split(",") if n]
    return names if PLUGIN_NAME in names else [PLUGIN_NAME, *names]
