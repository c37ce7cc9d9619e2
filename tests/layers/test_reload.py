# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Weights loaded into a model that serves, as vLLM does it layer by layer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.layers.quantized_layers import (
    activations,
    compressed_modules,
    config_of,
    load_tensors,
    row_case,
)
from tools.make_checkpoint import SCHEMES, compress

BF16 = torch.bfloat16
CASE = row_case(512, 96)

pytestmark = pytest.mark.usefixtures("single_rank")


def new_tensors(scheme: str) -> Any:
    modules = compressed_modules(CASE, scheme, BF16, bias=True)
    compress(modules)
    return modules


@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_is_that_of_the_new_weights(scheme: str) -> None:
    first, second = new_tensors(scheme), new_tensors(scheme)
    x = activations(5, CASE.k, BF16)
    outputs = []
    for tensors in (first, second):
        layer = CASE.build(
            bias=True,
            params_dtype=BF16,
            quant_config=config_of("re:.*", scheme),
            prefix="layer",
        )
        model = torch.nn.Sequential(layer)
        record_metadata_for_reloading(model)
        load_tensors(CASE, layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        outputs.append(layer(x)[0])
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    initialize_layerwise_reload(model)
    load_tensors(CASE, layer, first)
    finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
    assert not torch.equal(*outputs)
    assert torch.equal(layer(x)[0], outputs[0])
    # A captured graph reads the same memory.
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before
