# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""ModelSlim's tensors through this package's kernels, and vllm-ascend's own methods.

The functions of `kernels/linear/functional.py` and `weights/` know no file format. So
they have to compute what vllm-ascend's linear methods do for ModelSlim's: bit for bit
where both call an operator with the same integers and scales, and near float64 always.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.network_utils import get_open_port
from vllm_ascend import utils
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.quantization.methods import registry

from tests.formula import relative_error
from tests.layers.quantized_layers import activations
from tools.stacks.ranks import tensor_parallel
from vllm_ascend_ct.kernels.linear.functional import (
    dynamic_quant_int4_matmul,
    dynamic_quant_matmul,
    static_quant_matmul,
    weight_quant_matmul,
)
from vllm_ascend_ct.weights import int4, int_quantized

pytestmark = pytest.mark.vllm_ascend

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
TOKENS, K, N, GROUP = 32, 512, 128, 256
# One rounding of the result to x's dtype. A scale of fp16 has 11 bits at the operator.
TOLERANCES = {BF16: 2**-8, FP16: 2**-10}
# Then scales are products that were rounded to x's dtype, weights again.
WEIGHT_ONLY_TOLERANCES = {BF16: 2**-7, FP16: 2**-9}

# Linear methods of integers that this package has no kernel for.
OTHERS = {
    "W4A4_DYNAMIC": "int4 activations, rotated",
    "W4A4_FLATQUANT_DYNAMIC": "int4 activations, by npu_kronecker_quant",
}
BRIDGED = {"W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A8_DYNAMIC"}
# Layouts of int8: contiguous, FRACTAL_NZ as vllm-ascend casts it, a transposed view.
INT8_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda w: int_quantized.to_npu_weight(w, False, False),
    "nz": lambda w: int_quantized.to_npu_weight(w, True, False),
    "transposed-nz": lambda w: int_quantized.to_npu_weight(w, False, True),
}
LAYOUTS = pytest.mark.parametrize("layout", INT8_LAYOUTS)


@pytest.fixture(scope="module", autouse=True)
def vllm_config(model: Path) -> Iterator[Any]:
    """An engine's config, current, and what a worker prepares for methods."""
    arguments = EngineArgs(str(model), skip_tokenizer_init=True, max_model_len=512)
    config = arguments.create_engine_config()
    with (
        patch("torch.npu.current_device", return_value=torch.device("cpu")),
        patch.object(torch.Tensor, "npu", torch.Tensor.clone),
        tensor_parallel(rank=0, world_size=1, port=get_open_port()),
        set_current_vllm_config(config),
    ):
        # Later releases prefetch elsewhere.
        if hasattr(utils, "set_weight_prefetch_method"):
            utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
        yield config


@pytest.fixture
def description(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ModelSlim's file says of a model; the current config has it."""
    found: dict[str, Any] = {"group_size": GROUP}
    config = SimpleNamespace(quant_description=found, get_name=lambda: "ascend")
    monkeypatch.setattr(vllm_config, "quant_config", config)
    return found


class Slim(torch.nn.Module):
    """A layer with ModelSlim's tensors, and vllm-ascend's method for them."""

    def __init__(self, quant_type: str, dtype: torch.dtype, **tensors: Any) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
            self.register_parameter(name, parameter)
        self.params_dtype, self.prefix = dtype, "model.layers.0.fc"
        self._quant_comm_config: dict[str, Any] = {}
        method = registry.get_scheme_class(quant_type, "linear")
        assert method is not None
        self.method = method()
        self._check_names(dtype, set(tensors))

    def _check_names(self, dtype: torch.dtype, names: set[str]) -> None:
        """ModelSlim's files have a tensor for each parameter that the method makes."""
        made = {
            **self.method.get_weight(K, N, dtype),
            **self.method.get_pertensor_param(dtype),
            **self.method.get_perchannel_param(N, dtype),
            **self.method.get_pergroup_param(K, N, dtype, "column"),
        }
        assert {name for name in made if not name.startswith("_")} == names
        for name in names:
            assert made[name].shape == getattr(self, name).shape, name

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.method.process_weights_after_loading(self)
        y: torch.Tensor = self.method.apply(self, x, bias)
        return y


def int8_weight() -> torch.Tensor:
    return torch.randint(-128, 128, (N, K), dtype=torch.int8)


def scales(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


def per_channel(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "weight": int8_weight(),
        "weight_scale": scales(N, 1, dtype=dtype),
        "weight_offset": torch.zeros(N, 1, dtype=dtype),
    }


def test_all_integer_methods_are_bridged_or_named() -> None:
    known = {kind for kind, layer in registry._SCHEME_REGISTRY if layer == "linear"}
    integers = {kind for kind in known if "FP" not in kind.upper()}
    # 0.27 and later have no W4A8 linear layers.
    assert integers | {"W4A8_DYNAMIC"} == BRIDGED | set(OTHERS)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("quant_type", ["W8A8_DYNAMIC", "W8A8_MIX"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
def test_w8a8_dynamic(
    quant_type: str,
    layout: str,
    dtype: torch.dtype,
    has_bias: bool,
    description: dict[str, Any],
) -> None:
    tensors = per_channel(dtype)
    if dtype == FP16:
        # The operator's document has no fp16 scale, which the method would give it.
        tensors["weight_scale"] = tensors["weight_scale"].float()
    if quant_type == "W8A8_MIX":
        tensors |= static_tensors(tensors, dtype)
    x, bias = activations(TOKENS, K, dtype), torch.randn(N, dtype=dtype)
    bias = bias if has_bias else None
    theirs = Slim(quant_type, dtype, **tensors).run(x, bias)
    scale = tensors["weight_scale"].flatten()
    ours = dynamic_quant_matmul(
        x, INT8_LAYOUTS[layout](tensors["weight"]), scale.float(), bias
    )
    assert torch.equal(ours, theirs)

    q, x_scale = torch.ops.npu.npu_dynamic_quant(x)
    formula = q.double() * x_scale.double()[:, None] @ dequantized(tensors).t()
    formula = formula if bias is None else formula + bias.double()
    assert relative_error(ours, formula) < TOLERANCES[dtype]


def dequantized(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["weight"].double() * tensors["weight_scale"].double()


def static_tensors(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, bias: Any = None
) -> dict[str, torch.Tensor]:
    """What ModelSlim stores more: the zero point's share and the bias in one int32."""
    input_scale = torch.tensor([0.03]).to(dtype)
    input_offset = torch.tensor([5], dtype=torch.int8)
    product_scale = (input_scale.float() * tensors["weight_scale"].float()).flatten()
    quant_bias = -5 * tensors["weight"].long().sum(dim=1)
    if bias is not None:
        quant_bias += (bias.double() / product_scale.double()).round().long()
    # The product's scale as the operator of the dtype takes it.
    deq_scale = product_scale
    if dtype == FP16:
        deq_scale = product_scale.view(torch.int32).long()
    return {
        "input_scale": input_scale,
        "input_offset": input_offset,
        "quant_bias": quant_bias.int(),
        "deq_scale": deq_scale,
    }


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("quant_type", ["W8A8", "W8A8_MIX"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
def test_w8a8_static(
    quant_type: str,
    layout: str,
    dtype: torch.dtype,
    has_bias: bool,
    description: dict[str, Any],
) -> None:
    tensors = per_channel(dtype)
    bias = torch.randn(N, dtype=dtype) if has_bias else None
    static = static_tensors(tensors, dtype, bias)
    layer = Slim(quant_type, dtype, **tensors, **static)
    # Of the mix only what decodes for others is static.
    layer.method._is_kv_consumer = True
    x = activations(TOKENS, K, dtype)
    theirs = layer.run(x, bias)

    weight = INT8_LAYOUTS[layout](tensors["weight"])
    input_scale, input_offset = static["input_scale"], static["input_offset"]
    share = int_quantized.weight_sum(tensors["weight"]) * -input_offset.int()
    product_scale = (input_scale.float() * tensors["weight_scale"].float()).flatten()
    quant_bias = int_quantized.int32_bias(share, bias, product_scale)
    assert torch.equal(quant_bias, static["quant_bias"])
    ours = static_quant_matmul(
        x,
        weight,
        static["deq_scale"],
        input_scale.reciprocal().repeat(K),
        input_offset.to(dtype).repeat(K),
        quant_bias,
        divides=False,
    )
    assert torch.equal(ours, theirs)

    # Divided by the scale, nothing of x is lost before.
    divided = static_quant_matmul(
        x,
        weight,
        static["deq_scale"],
        input_scale.float(),
        input_offset.int(),
        quant_bias,
    )
    q = (x.double() / input_scale.double()).round() + input_offset.double()
    steps = q.clamp(-128, 127) - input_offset.double()
    formula = steps * input_scale.double() @ dequantized(tensors).t()
    formula = formula if bias is None else formula + bias.double()
    assert relative_error(divided, formula) < TOLERANCES[dtype]


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("has_offset", [False, True], ids=["symmetric", "offset"])
def test_w8a16(layout: str, dtype: torch.dtype, has_offset: bool) -> None:
    tensors = per_channel(dtype)
    if has_offset:
        offset = torch.randint(-20, 20, (N, 1))
        tensors["weight_offset"] = offset.to(dtype)
    x = activations(TOKENS, K, dtype)
    # The operator's document has fp32 for bf16 x, which the method does not give it.
    bias = torch.randn(N, dtype=dtype) if dtype == FP16 else None
    theirs = Slim("W8A16", dtype, **tensors).run(x, bias)
    ours = weight_quant_matmul(
        x,
        INT8_LAYOUTS[layout](tensors["weight"]),
        tensors["weight_scale"].t(),
        tensors["weight_offset"].t(),
        bias,
    )
    assert torch.equal(ours, theirs)

    weight = tensors["weight"].double() + tensors["weight_offset"].double()
    formula = x.double() @ (weight * tensors["weight_scale"].double()).t()
    formula = formula if bias is None else formula + bias.double()
    assert relative_error(ours, formula) < WEIGHT_ONLY_TOLERANCES[dtype]


def _w4a8_tensors(
    values: torch.Tensor, version: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    tensors = {
        "weight": values,
        "weight_scale": scales(N, 1, dtype=dtype),
        "weight_offset": torch.zeros(N, 1, dtype=dtype),
        "weight_scale_second": (torch.rand(N, K // GROUP) + 0.5).to(dtype),
        "weight_offset_second": torch.zeros(N, K // GROUP, dtype=dtype),
    }
    if version == "1.0.0":
        # Two outputs to a byte, the first in the low nibble.
        tensors["weight"] = (values[::2] & 15) | (values[1::2] << 4)
        tensors["scale_bias"] = torch.zeros(N, 1)
    return tensors


@DTYPES
@pytest.mark.parametrize("version", ["0", "1.0.0"])
def test_w4a8(version: str, dtype: torch.dtype, description: dict[str, Any]) -> None:
    if registry.get_scheme_class("W4A8_DYNAMIC", "linear") is None:
        pytest.skip("this vllm-ascend has no W4A8 linear layers")
    description["version"] = version
    values = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    tensors = _w4a8_tensors(values, version, dtype)
    x = activations(TOKENS, K, dtype)
    # Their method does not quantize x.
    theirs = Slim("W4A8_DYNAMIC", dtype, **tensors).run(x)

    words = [int4.pack(part) for part in int_quantized.int4_rows(values)]
    packed = int4.pack_outputs(words, N, K, x.device)
    scale = tensors["weight_scale"].float() * tensors["weight_scale_second"]
    ours = weight_quant_matmul(
        x, packed, scale.t().contiguous().to(dtype), group_size=GROUP
    )
    assert torch.equal(ours, theirs)
    weight = values.double() * scale.double().repeat_interleave(GROUP, dim=1)
    formula = x.double() @ weight.t()
    assert relative_error(ours, formula) < WEIGHT_ONLY_TOLERANCES[dtype]

    # What the name promises.
    words = [int4.pack(part) for part in int_quantized.int4_rows(values)]
    packed, assist = int4.pack_outputs_with_assist(words, scale, K)
    npu_scale = torch.ops.npu.npu_trans_quant_param(scale.t().reshape(1, -1), None, 1)
    quantized = dynamic_quant_int4_matmul(
        x, packed, npu_scale.view(K // GROUP, N), assist, group_size=GROUP
    )
    q, x_scale = torch.ops.npu.npu_dynamic_quant(x)
    formula = q.double() * x_scale.double()[:, None] @ weight.t()
    assert relative_error(quantized, formula) < WEIGHT_ONLY_TOLERANCES[dtype]
