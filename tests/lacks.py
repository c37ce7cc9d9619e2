# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What older releases of vLLM lack, so that this package refuses it there by name."""

import re

import pytest
import vllm
from packaging.version import Version

# Up to this release: beginnings of the refusals. No later release has them.
_LAST = Version("0.30.0")
_REFUSALS = re.compile(
    r"Asymmetric quantization not supported for num_bits = [23567]\. Supported: "
    r"\[4, 8\] \(layer |"
    "(Zero points of packed weights with 8-bit activations|Biases of experts), for "
    r"which this vLLM release has no parameters \(layer "
)


def is_older() -> bool:
    """Whether the vLLM under test lacks something that the tests use."""
    return Version(vllm.__version__) <= _LAST


def skip_if_named(error: BaseException) -> None:
    """Skip a test if a refusal names something that the vLLM under test lacks."""
    if is_older() and _REFUSALS.match(str(error)):
        pytest.skip(f"this vLLM lacks it: {error}")
