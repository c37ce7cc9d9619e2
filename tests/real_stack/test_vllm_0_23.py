# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the release of vLLM that vllm-ascend 0.23.0 needs has no scheme for."""

import pytest
import torch
from vllm.model_executor.layers.linear import ReplicatedLinear

from tests.layers.quantized_layers import config_of
from vllm_ascend_ct.errors import UnsupportedCheckpointError

pytestmark = [pytest.mark.vllm_ascend, pytest.mark.usefixtures("single_rank")]


@pytest.mark.parametrize(
    "scheme",
    [
        "w2a16-g64-asym",
        "w2a16-channel",
        "w3a16-channel",
        "w6a16-g64-asym",
        "w4a8-channel-packed",
        "w8a8-channel-packed",
    ],
)
def test_refused_by_name(scheme: str) -> None:
    """And not served by a scheme that drops their zero points."""
    with pytest.raises(UnsupportedCheckpointError, match="model.layers.0.fc"):
        ReplicatedLinear(
            512,
            64,
            params_dtype=torch.bfloat16,
            quant_config=config_of("re:.*", scheme),
            prefix="model.layers.0.fc",
        )
