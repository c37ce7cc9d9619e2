# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Environment variables, read when asked for and validated."""

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
    """The names in `VLLM_PLUGINS`; empty when it is not set."""
    import vllm.envs

    return vllm.envs.VLLM_PLUGINS or []


def emulate() -> bool | None:
    """Whether to emulate the NPU operators; None leaves it to what is installed.

    Raises:
        ValueError: The variable is neither 0 nor 1.

    """
    value = choice(EMULATE, ("0", "1"))
    return None if value is None else value == "1"


def any_release() -> bool:
    """Whether to go on with releases that are not in the table of `releases.py`.

    Raises:
        ValueError: The variable is neither 0 nor 1.

    """
    return choice(ANY_RELEASE, ("0", "1")) == "1"


def resolve() -> bool:
    """Whether weights that the chip does not multiply are resolved to 16 bits.

    Raises:
        ValueError: The variable is neither 0 nor 1.

    """
    return choice(RESOLVE, ("0", "1")) != "0"


def emulate_keep_bytes() -> int:
    """Memory that emulated operators may keep weights in, in forms that CPUs multiply.

    Raises:
        ValueError: The variable is not a number of GiB.

    """
    value = os.environ.get(EMULATE_KEEP_GIB) or _DEFAULT_KEEP_GIB
    try:
        return int(float(value) * 2**30)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"Invalid value in the environment ({EMULATE_KEEP_GIB}={value!r}). "
            "Supported: a number of GiB, or unset. Correct or unset the variable."
        ) from error


def layouts() -> dict[str, str]:
    """The layouts that are asked for, by kind; `ops/layouts.py` knows the names."""
    pairs = (os.environ.get(LAYOUT) or "").split(",")
    named = (pair.partition("=") for pair in pairs if pair.strip())
    return {kind.strip(): name.strip() for kind, _, name in named}


def choice(name: str, choices: Collection[str]) -> str | None:
    """Read variable `name`, which must be one of `choices`; None when unset or empty.

    Raises:
        ValueError: It has another value.

    """
    value = os.environ.get(name) or None
    if value is not None and value not in choices:
        raise ValueError(
            f"Invalid value in the environment ({name}={value!r}). Supported: "
            f"{', '.join(choices)}, or unset. Correct or unset the variable."
        )
    return value
