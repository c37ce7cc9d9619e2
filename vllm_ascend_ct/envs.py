# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Environment variables of this package, read and validated at each call."""

import os
from collections.abc import Collection

EMULATE = "VLLM_ASCEND_CT_EMULATE"
EMULATE_KEEP_GIB = "VLLM_ASCEND_CT_EMULATE_KEEP_GIB"
SOC = "VLLM_ASCEND_CT_SOC"
ANY_RELEASE = "VLLM_ASCEND_CT_ANY_RELEASE"
LAYOUT = "VLLM_ASCEND_CT_LAYOUT"
RESOLVE = "VLLM_ASCEND_CT_RESOLVE"

ENVIRONMENT_VARIABLES = (EMULATE, EMULATE_KEEP_GIB, SOC, ANY_RELEASE, LAYOUT, RESOLVE)
_DEFAULT_KEEP_GIB = 4


def requested_plugins() -> list[str]:
    """The names in `VLLM_PLUGINS`; empty if it is not set."""
    import vllm.envs

    return vllm.envs.VLLM_PLUGINS or []


def emulate() -> bool | None:
    """Whether to emulate the NPU operators; None if the variable is not set.

    Raises:
        ValueError: The variable is neither 0 nor 1.

    """
    value = choice(EMULATE, ("0", "1"))
    return None if value is None else value == "1"


def any_release() -> bool:
    """Whether to run on releases that `releases.py` does not list as tested.

    Raises:
        ValueError: The variable is neither 0 nor 1.

    """
    return choice(ANY_RELEASE, ("0", "1")) == "1"


def resolve() -> bool:
    """Whether float weights that the chip cannot multiply may be resolved to 16 bits.

    Raises:
        ValueError: The variable is neither 0 nor 1.

    """
    return choice(RESOLVE, ("0", "1")) != "0"


def emulate_keep_bytes() -> int:
    """Bytes that the emulated operators may use to cache converted weights.

    Raises:
        ValueError: The variable is not a finite number of GiB.

    """
    value = os.environ.get(EMULATE_KEEP_GIB) or _DEFAULT_KEEP_GIB
    try:
        return int(float(value) * 2**30)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"Invalid environment variable ({EMULATE_KEEP_GIB}={value!r}). "
            "Supported: a number of GiB, or unset. Correct or unset the variable."
        ) from error


def layouts() -> dict[str, str]:
    """Layouts that `VLLM_ASCEND_CT_LAYOUT` requests, by kind of linear layer.

    Not validated here: `ops/layouts.py` has the known kinds and names.
    """
    pairs = (os.environ.get(LAYOUT) or "").split(",")
    named = (pair.partition("=") for pair in pairs if pair.strip())
    return {kind.strip(): name.strip() for kind, _, name in named}


def choice(name: str, choices: Collection[str]) -> str | None:
    """Read a variable that takes one of a few values.

    Args:
        name: Name of the variable.
        choices: Its allowed values.

    Returns:
        The value; None if the variable is unset or empty.

    Raises:
        ValueError: The value is not one of `choices`.

    """
    value = os.environ.get(name) or None
    if value is not None and value not in choices:
        raise ValueError(
            f"Invalid environment variable ({name}={value!r}). Supported: "
            f"{', '.join(choices)}, or unset. Correct or unset the variable."
        )
    return value
