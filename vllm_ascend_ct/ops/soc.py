# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The Ascend chip whose operator limits apply."""

from enum import Enum

from vllm_ascend_ct import envs


class Soc(Enum):
    """Ascend chip families. A2 and A3 run the same kernels."""

    A2 = "A2"
    A3 = "A3"
    ASCEND_310P = "310P"
    A5 = "A5"


_default = Soc.A2
# A compiled forward looks up a chip, and torch 2.10 cannot trace iterating over an
# Enum.
_BY_NAME = {soc.value: soc for soc in Soc}


def set_default_soc(soc: Soc) -> None:
    """Set the chip that `current_soc` returns if the environment names none."""
    global _default
    _default = soc


def requested_soc() -> Soc | None:
    """The chip named by `VLLM_ASCEND_CT_SOC`; None if it is not set.

    Raises:
        ValueError: The variable does not name a supported chip.

    """
    value = envs.choice(envs.SOC, _BY_NAME)
    return None if value is None else _BY_NAME[value]


def current_soc() -> Soc:
    """The chip named by `VLLM_ASCEND_CT_SOC`, otherwise the default.

    Raises:
        ValueError: The variable does not name a supported chip.

    """
    return requested_soc() or _default
