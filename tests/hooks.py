# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which of the hooks that `upstream_patches` stages this vLLM has."""

import os

import pytest
from vllm.platforms import Platform

from vllm_ascend_ct import compat

# Set by `tools.upstream_patches test`, for a vLLM with all of them.
EXPECTED = os.environ.get("VLLM_ASCEND_CT_TEST_HOOKS") == "1"
CONFIG = hasattr(Platform, "get_quant_config")
ACTIVATIONS = compat.KERNELS_KNOW_ACTIVATIONS
EXPERTS = compat.register_moe_experts is not None

needed = pytest.mark.skipif(
    not (EXPECTED or CONFIG and ACTIVATIONS and EXPERTS),
    reason="this vLLM has no hooks; python -m tools.upstream_patches test",
)
