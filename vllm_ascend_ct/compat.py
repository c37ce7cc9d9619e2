# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What differs between the vLLM releases that are supported."""

from typing import Any

# What experts return who leave the sum over each token's rows to their caller. None in
# releases whose modular kernel does not pass it on.
UnfinalizedMoEOutput: Any = None
try:
    from vllm.model_executor.layers.fused_moe import moe_output
except ImportError:
    pass
else:
    UnfinalizedMoEOutput = moe_output.UnfinalizedMoEOutput
