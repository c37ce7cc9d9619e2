# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""vllm-ascend's layers on the chip that `REAL_STACK_CHIP` names; A2 by default."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.formula import FormulaLinear, relative_error
from tests.layers.quantized_experts import (
    ROUNDINGS,
    SERVED,
    FormulaExperts,
    compressed_experts,
    experts_of,
    is_weight_only,
    routing,
)
from tests.layers.quantized_layers import (
    MULTIPLIED,
    MULTIPLIED_MX,
    TOLERANCES,
    activations,
    compressed_modules,
    config_of,
    load_embedding,
    load_head,
    replicated_case,
    tolerance,
)
from tests.layers.quantized_layers import load as load_layer
from tests.layers.quantized_layers import load_tensors as load_linear
from tests.layers.test_linear import check_on_chip
from tests.real_stack.ascend_experts import (
    ROUNDED_TOLERANCE,
    SIZES,
    build,
    load,
    load_tensors,
    run,
)
from tools.checkpoints.make_checkpoint import SCHEMES, compress
from tools.numerics.record_npu_calls import CallRecorder
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops.soc import current_soc
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)

pytestmark = [pytest.mark.vllm_ascend, pytest.mark.usefixtures("vllm_config")]

CHIP = os.environ.get("REAL_STACK_CHIP") or "A2"
DTYPE = torch.float16 if CHIP == "310P" else torch.bfloat16


def test_chip_is_vllm_ascends() -> None:
    assert current_soc().value == CHIP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(scheme: str, dtype: torch.dtype) -> None:
    check_on_chip(scheme, dtype, CHIP)


@pytest.fixture
def eager() -> Iterator[None]:
    """compressed-tensors packs FP4 with a compiled function, which needs a device."""
    with torch.compiler.set_stance("force_eager"):
        yield


on_a5 = pytest.mark.skipif(CHIP != "A5", reason="other chips resolve these weights")


@on_a5
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", MULTIPLIED)
def test_linear_of_floats(scheme: str, dtype: torch.dtype, eager: None) -> None:
    case = replicated_case(352, 96)
    layer, (formula,) = load_layer(case, scheme, dtype, bias=True)
    assert type(layer.quant_method) is AscendCTLinearMethod
    x = formula.without_ties(activations(7, case.k, dtype))
    assert relative_error(layer(x)[0], formula(x)) < tolerance(scheme, dtype)


def own_method(scheme: str) -> Any:
    """vllm-ascend's own method of linear layers."""
    from vllm_ascend.quantization.methods import w4a4_mxfp4, w8a8_mxfp8

    if scheme == "mxfp8":
        return w8a8_mxfp8.AscendW8A8MXFP8DynamicLinearMethod()
    return w4a4_mxfp4.AscendW4A4MXFP4DynamicLinearMethod()


@on_a5
@pytest.mark.parametrize("scheme", MULTIPLIED_MX)
def test_mx_calls_are_those_of_vllm_ascend(
    scheme: str, vllm_config: Any, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    """The same arguments in the same layout; FP4 activations round ties otherwise."""
    monkeypatch.setattr(vllm_config, "quant_config", config_of("re:.*", scheme))
    case = replicated_case(384, 48)
    modules = compressed_modules(case, scheme, DTYPE, True)
    compress(modules)
    tensors = {k: t.data for k, t in modules["out_proj"].named_parameters()}
    config = config_of("re:.*", scheme)
    layer = case.build(params_dtype=DTYPE, quant_config=config, prefix="fc")
    load_linear(case, layer, modules)
    layer.quant_method.process_weights_after_loading(layer)
    other, method = torch.nn.Module(), own_method(scheme)
    for name in ("weight", "weight_scale"):
        stored = tensors.get(name, tensors.get("weight_packed")).clone()
        other.register_parameter(name, torch.nn.Parameter(stored, requires_grad=False))
    method.process_weights_after_loading(other)
    x = activations(7, case.k, DTYPE)
    ours, theirs = CallRecorder(), CallRecorder()
    with ours:
        y = layer(x)[0]
    with theirs:
        expected = method.apply(other, x, tensors["bias"])
    (quantize, multiply), (their_quantize, their_multiply) = (
        recorder.calls.values() for recorder in (ours, theirs)
    )
    if scheme == "mxfp4":
        assert their_quantize[2].pop("round_mode") == "round"
        # What is quantized otherwise.
        for _, args, kwargs in (multiply, their_multiply):
            del args[0], kwargs["pertoken_scale"]
    else:
        assert torch.equal(y, expected)
    assert described(quantize) == described(their_quantize)
    assert described(multiply) == described(their_multiply)


def described(call: Any) -> Any:
    """A recorded call, with tensors as their layouts and values."""

    def describe(tensor: torch.Tensor) -> Any:
        stored = tensor.contiguous().view(torch.uint8)
        return tensor.dtype, tensor.shape, tensor.stride(), stored.flatten().tolist()

    return tree_map_only(torch.Tensor, describe, call)


def test_embedding_and_head() -> None:
    embedding, formula = load_embedding(1024, 256, "w8a16-channel", DTYPE)
    rows = embedding(torch.arange(1024))
    assert relative_error(rows, formula.weight) < TOLERANCES[DTYPE]
    head, formula = load_head(1024, 256, "w8a16-channel", DTYPE)
    suffix = "310" if CHIP == "310P" else ""
    assert type(head).__name__ == f"AscendParallelLMHead{suffix}"
    x = activations(7, 256, DTYPE)
    y = head.quant_method.apply(head, x)
    assert relative_error(y, formula(x)) < TOLERANCES[DTYPE]


@pytest.mark.parametrize("scheme", SERVED)
def test_experts(scheme: str, vllm_config: Any) -> None:
    int8 = not is_weight_only(scheme) and SCHEMES[scheme].weights.num_bits > 4
    if CHIP == "310P" and not int8:
        with pytest.raises(
            UnsupportedCheckpointError, match="no operator that multiplies"
        ):
            load(scheme, vllm_config, DTYPE)
        return
    layer, formula = load(scheme, vllm_config, DTYPE)
    name = type(layer.quant_method.experts).__name__
    dequant = "Dequant" if CHIP == "310P" else ""
    quantized = name == f"AscendWNA8{dequant}Experts"
    # A5 has an int8 product, but vllm-ascend does not call it correctly.
    assert quantized is (CHIP != "A5" and not is_weight_only(scheme))
    x = formula.without_ties(activations(64, SIZES.hidden, DTYPE))
    routed = routing(SIZES, 64)
    output = run(layer, x.clone(), routed, vllm_config)
    expected = formula(x, routed[0].to(DTYPE), routed[1])
    limit = ROUNDED_TOLERANCE if quantized else ROUNDINGS[DTYPE] * 1.1
    assert relative_error(output, expected) < limit


def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    group_list: torch.Tensor,
    group_list_type: int,
    **_: Any,
) -> list[torch.Tensor]:
    """The operator for unquantized weights, which is not emulated."""
    counts = group_list
    if group_list_type == 0:
        counts = group_list.diff(prepend=group_list.new_zeros(1))
    rows = x[0].split(counts.tolist())
    return [torch.cat([r @ w for r, w in zip(rows, weight[0], strict=True)])]


def unquantized(linear: torch.nn.Linear) -> FormulaLinear:
    return FormulaLinear(linear.weight.double(), None, None, None, None)


def test_unquantized_experts(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model with quantized linear layers."""
    import torch_npu

    _, config, _ = compressed_experts(SIZES, "w8a16-channel", DTYPE)
    config["ignore"] = ["re:.*experts.*"]
    layer = build(config, vllm_config, DTYPE)
    suffix = "310" if CHIP == "310P" else ""
    name = f"AscendUnquantizedFusedMoEMethod{suffix}"
    assert type(layer.quant_method).__name__ == name
    if CHIP == "310P":
        # Its routing operator is not emulated.
        return
    modules = experts_of(SIZES, DTYPE)
    load_tensors(layer, modules)
    layer.quant_method.process_weights_after_loading(layer)
    routed = routing(SIZES, 64)
    module = type(layer.quant_method).__module__
    monkeypatch.setattr(f"{module}.select_experts", lambda **_: routed)
    monkeypatch.setattr(torch_npu, "npu_grouped_matmul", grouped_matmul)
    x = activations(64, SIZES.hidden, DTYPE)
    formula = FormulaExperts(
        [
            {n: unquantized(linear) for n, linear in expert.items()}
            for expert in modules.values()
        ]
    )
    expected = formula(x, routed[0].to(DTYPE), routed[1])
    output = run(layer, x, None, vllm_config)
    assert relative_error(output, expected) < ROUNDINGS[DTYPE] * 1.1
