# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Reloading weights into a model that is serving, layer by layer as vLLM does.

Also after a sleep that has left nothing but buffers.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.formula import formula_linear, relative_error
from tests.layers.discarding import discard
from tests.layers.quantized_layers import (
    MULTIPLIED,
    TOLERANCES,
    activations,
    compressed_modules,
    compressed_table,
    config_of,
    load_embedding,
    load_table,
    load_tensors,
    row_case,
)
from tools.checkpoints.make_checkpoint import (
    ALL_SCHEMES,
    FLOAT_SCHEMES,
    SCHEMES,
    compress,
)
from vllm_ascend_ct.ascend_base import runs_on_vllm_ascend
from vllm_ascend_ct.errors import UnsupportedCheckpointError

BF16 = torch.bfloat16
SCHEME = "w4a16-g32"
CASE = row_case(512, 96)

pytestmark = pytest.mark.usefixtures("single_rank")


def new_tensors(scheme: str) -> Any:
    modules = compressed_modules(CASE, scheme, BF16, bias=True)
    compress(modules)
    return modules


# vllm-ascend runs unquantized layers with operators that need a device.
on_upstream = pytest.mark.skipif(
    runs_on_vllm_ascend(), reason="needs a device: see tests/soft_npu"
)
RELOADED = [
    *((scheme, "A2") for scheme in SCHEMES),
    *(pytest.param(scheme, "A2", marks=on_upstream) for scheme in FLOAT_SCHEMES),
    *(pytest.param(scheme, "A5", marks=on_upstream) for scheme in MULTIPLIED),
]


@pytest.mark.parametrize(("scheme", "soc"), RELOADED)
def test_output_is_that_of_the_new_weights(
    monkeypatch: pytest.MonkeyPatch, scheme: str, soc: str
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
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
    discard(model)
    initialize_layerwise_reload(model)
    load_tensors(CASE, layer, first)
    finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
    assert not torch.equal(*outputs)
    assert torch.equal(layer(x)[0], outputs[0])
    # A captured graph reads the same memory.
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before


def test_head_tied_to_an_embedding() -> None:
    """The head follows; in vLLM 0.23 it has a module of its own."""
    models = []

    def tie(embedding: Any) -> None:
        head = ParallelLMHead(1024, 256, quant_config=config_of("re:none", SCHEME))
        tied = head.tie_weights(embedding)
        models.append(torch.nn.ModuleList([embedding, tied]))
        record_metadata_for_reloading(models[0])

    embedding, formula = load_embedding(1024, 256, SCHEME, BF16, built=tie)
    (model,) = models
    _, head = model
    if head is not embedding:
        head.quant_method.process_weights_after_loading(head)
    x = activations(7, 256, BF16)
    outputs = [head.quant_method.apply(head, x)]
    discard(model)
    tables = [
        compressed_table(torch.nn.Embedding(1024, 256), SCHEME, BF16) for _ in range(2)
    ]
    for table in (tables[0], tables[1], tables[0]):
        initialize_layerwise_reload(model)
        load_table(embedding, table)
        finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
        outputs.append(head.quant_method.apply(head, x))
        expected = formula_linear(table, ALL_SCHEMES[SCHEME])(x)
        assert relative_error(outputs[-1], expected) < TOLERANCES[BF16]
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert relative_error(outputs[0], formula(x)) < TOLERANCES[BF16]


@on_upstream
@pytest.mark.parametrize("given", ["weight", "weight_scale"])
def test_part_of_a_resolved_weight_is_refused(given: str) -> None:
    scheme = "fp8-channel-a16"
    tensors = new_tensors(scheme)
    config = config_of("re:.*", scheme)
    layer = CASE.build(bias=True, params_dtype=BF16, quant_config=config, prefix="x")
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    load_tensors(CASE, layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    (module,) = tensors.values()
    initialize_layerwise_reload(model)
    parameter = getattr(layer, given)
    parameter.weight_loader(parameter, getattr(module, given).data.clone())
    missing = ({"weight", "weight_scale"} - {given}).pop()
    with pytest.raises(UnsupportedCheckpointError, match=f"{missing} is missing"):
        finalize_layerwise_reload(model, SimpleNamespace(dtype=BF16))
    assert not layer.quant_method._pieces


def test_what_is_no_parameter_is_lost() -> None:
    """Otherwise the tests above could not find it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    (layer,) = model
    layer.register_buffer("ids", torch.ones(2), persistent=False)
    layer.kernel = SimpleNamespace(tables=[{"signs": torch.ones(4)}], layer=layer)
    discard(model)
    assert layer.ids.tolist() == [1, 1]
    assert (layer.kernel.tables[0]["signs"] < -20).all() and (layer.weight < -20).all()
