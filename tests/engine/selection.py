# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Selects the engines that the default run of the tests starts."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_long(names: Iterable[str], *usual: str) -> list[Any]:
    """Parameters of a test, of which all but the `usual` ones are marked `long`."""
    return [
        name if name in usual else pytest.param(name, marks=pytest.mark.long)
        for name in names
    ]
