# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Upstream's experts with random compressed-tensors weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from vllm.config import get_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.formula import FormulaLinear, formula_linear
from tests.layers.quantized_layers import MULTIPLIED_EXPERTS
from tools.checkpoints.make_checkpoint import (
    ALL_SCHEMES,
    FLOAT_SCHEMES,
    SCHEMES,
    compress,
    prepare,
    set_range,
)
from vllm_ascend_ct.ops.soc import Soc, current_soc

# For tests that build experts, or compute experts of later releases.
factory_needed = pytest.mark.skipif(
    not hasattr(fused_moe, "FusedMoEFactory"),
    reason="this vLLM builds experts in another way",
)

PREFIX = "model.layers.0.mlp.experts"

BF16, FP16 = torch.bfloat16, torch.float16
# Compared with a float64 formula that rounds weights, products and activation to 16
# bits like 16-bit operators: only the rounding of the sum remains.
WEIGHT_ONLY_TOLERANCE = 3e-3
# Compared with plain float64: five more roundings, of which those of gate and up
# multiply.
ROUNDINGS = {BF16: 6e-3, FP16: 8e-4}
INT8_TOLERANCE = 1e-2

SERVED = [
    scheme
    for scheme, args in SCHEMES.items()
    if args.output_activations is None
    and "static" not in scheme
    and "tensor" not in scheme
    and not (scheme.startswith(("w5", "w6", "w7", "w8")) and "-g" in scheme)
]


def is_weight_only(scheme: str) -> bool:
    """Whether activations stay in 16 bits."""
    args = ALL_SCHEMES[scheme]
    if scheme in MULTIPLIED_EXPERTS and current_soc() is Soc.A5:
        return False
    if args.input_activations is None or scheme in FLOAT_SCHEMES:
        return True
    groups = args.weights.group_size not in (None, 256)
    return groups or not (args.weights.symmetric and args.input_activations.symmetric)


@dataclass(frozen=True)
class Sizes:
    experts: int
    hidden: int
    intermediate: int
    top_k: int


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


@dataclass
class RoundedLinear(FormulaLinear):
    """A layer in float64 that rounds its inputs and results like 16-bit operators.

    If it is weight-only, also its weight.
    """

    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, formula: FormulaLinear, dtype: torch.dtype) -> "RoundedLinear":
        assert formula.input_scale is formula.output_scale is None
        weight, inputs = formula.weight, formula.input_args
        if inputs is None:
            weight = weight.to(dtype).double()
        return cls(weight, inputs, None, None, formula.bias, dtype=dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x.to(self.dtype)).to(self.dtype).double()


@dataclass
class FormulaExperts:
    """Float64 formula of experts."""

    experts: list[dict[str, FormulaLinear]]

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: Any = swiglu,
        experts: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Sum the outputs of `experts`, or of all, for each token."""
        total = torch.zeros(x.shape, dtype=torch.float64)
        for number in range(len(self.experts)) if experts is None else experts:
            tokens, choices = (ids == number).nonzero(as_tuple=True)
            if len(tokens):
                expert = self.experts[number]
                gate, up = (
                    expert[name](x[tokens]) for name in ("gate_proj", "up_proj")
                )
                rows = expert["down_proj"](activation(gate, up))
                total.index_add_(
                    0, tokens, rows * weights[tokens, choices].double().unsqueeze(1)
                )
        return total

    def rounded(self, dtype: torch.dtype) -> "FormulaExperts":
        """The same formula with each weight and product rounded to `dtype`."""
        return FormulaExperts(
            [
                {name: RoundedLinear.of(f, dtype) for name, f in expert.items()}
                for expert in self.experts
            ]
        )

    def without_ties(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0]["gate_proj"].without_ties(x)


def experts_of(
    sizes: Sizes, dtype: torch.dtype, bias: bool = False
) -> torch.nn.ModuleDict:
    """A checkpoint's experts before they are quantized."""
    h, i = sizes.hidden, sizes.intermediate
    shapes = {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}
    return torch.nn.ModuleDict(
        {
            str(number): torch.nn.ModuleDict(
                {name: torch.nn.Linear(k, n, bias) for name, (k, n) in shapes.items()}
            )
            for number in range(sizes.experts)
        }
    ).to(dtype)


def compressed_experts(
    sizes: Sizes, scheme: str, dtype: torch.dtype, bias: bool = False
) -> tuple[torch.nn.ModuleDict, Any, list[dict[str, FormulaLinear]]]:
    """Quantize a checkpoint's experts with the compressed-tensors library.

    Returns:
        The modules, the quantization config, and formulas by expert and projection.

    """
    modules = experts_of(sizes, dtype, bias)
    for prepared in prepare(modules, {"Linear": scheme}):
        set_range(prepared, "input", torch.tensor(-2.0), torch.tensor(2.0))
    schemes = {
        name: module.quantization_scheme
        for name, module in modules.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    compress(modules)
    config = QuantizationConfig.from_pretrained(modules).model_dump()
    formulas = [
        {
            name: formula_linear(module, schemes[f"{number}.{name}"])
            for name, module in expert.items()
        }
        for number, expert in modules.items()
    ]
    return modules, config, formulas


def tensors_of(modules: torch.nn.ModuleDict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in modules.named_parameters():
        yield name, tensor.data.clone()


def build(sizes: Sizes, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Build upstream's layer from a checkpoint's quantization config."""
    made = get_quantization_config("compressed-tensors").from_config(config)
    return build_with(sizes, made, dtype, **options)


def build_with(sizes: Sizes, made: Any, dtype: torch.dtype, **options: Any) -> Any:
    """Build upstream's layer."""
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    get_current_vllm_config().compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(dtype):
        return FusedMoEFactory(
            num_experts=sizes.experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            quant_config=made,
            prefix=PREFIX,
            **options,
        )


def load(
    sizes: Sizes,
    scheme: str,
    dtype: torch.dtype,
    weight_only: bool = False,
    **options: Any,
) -> tuple[Any, FormulaExperts]:
    """Build and load upstream's layer.

    Args:
        sizes: Sizes of the layer.
        scheme: One of `SCHEMES`.
        dtype: dtype of the activations.
        weight_only: Whether activations stay in 16 bits although the scheme quantizes
            them.
        options: Options of upstream's factory.

    Returns:
        The runner, ready to run, and the formula of its experts.

    """
    bias = options.get("has_bias", False)
    modules, config, formulas = compressed_experts(sizes, scheme, dtype, bias)
    runner = build(sizes, config, dtype, **options)
    list(runner.load_weights(tensors_of(modules)))
    layer = runner.routed_experts
    layer.quant_method.process_weights_after_loading(layer)
    if weight_only:
        for expert in formulas:
            for formula in expert.values():
                formula.input_args = None
    return runner, FormulaExperts(formulas)


def routing(
    sizes: Sizes, tokens: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed weights and choices; no token goes to the second or the last expert."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, sizes.experts, generator=generator)
    scores[:, [1, -1]] = -1
    weights, ids = scores.topk(sizes.top_k, sorted=False)
    return weights.softmax(-1), ids.to(torch.int32)


def run(runner: Any, x: torch.Tensor, routed: Any) -> torch.Tensor:
    """Run the experts after the router."""
    with set_forward_context(None, get_current_vllm_config()):
        result: torch.Tensor = runner.routed_experts.forward_modular(x, *routed)
        return result
