# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Upstream's linear layers with random compressed-tensors weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.formula import FormulaLinear, formula_linear
from tools.checkpoints.make_checkpoint import (
    ALL_SCHEMES,
    FLOAT_SCHEMES,
    compress,
    prepare,
    set_range,
)
from vllm_ascend_ct.ops import layouts
from vllm_ascend_ct.ops.precedents import RECIPROCAL
from vllm_ascend_ct.ops.soc import Soc, current_soc

HEAD_SIZE = 64
# Narrower than the outputs, so that some saturate.
OUTPUT_RANGE = torch.tensor(-1.0), torch.tensor(1.0)
PREFIX = "model.layers.0"
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
# Relative error compared with float64; both dtypes round the weights and the result.
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
# The operator neither rounds its offset nor keeps 0 within the range.
DYNAMIC_ASYMMETRIC_TOLERANCE = 2e-2


# Outputs close to the middle of two grid values may round either way.
OUTPUT_GRID_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 3e-3}
# Quantized activations that no operator supports with these weights stay in 16 bits.
WEIGHT_ONLY = (
    "w4a8-g128",
    "w4a8-g32",
    "w4a8-channel-asym-inputs",
    "w4a8-g64-asym",
    "w8a8-g128",
)


# Schemes of linear layers that A5 multiplies in FP8, and in MX formats.
MULTIPLIED_FP8 = ("fp8-channel-dynamic", "fp8-tensor-dynamic")
MULTIPLIED_MX = ("mxfp8", "mxfp4")
MULTIPLIED = MULTIPLIED_FP8 + MULTIPLIED_MX
# Of experts.
MULTIPLIED_EXPERTS = ("fp8-channel-dynamic", *MULTIPLIED_MX)


def is_weight_only(scheme: str, k: int) -> bool:
    """Whether activations stay in 16 bits although the scheme quantizes them."""
    if scheme in MULTIPLIED and current_soc() is Soc.A5:
        return False
    if scheme in FLOAT_SCHEMES:
        return True
    one_group = ALL_SCHEMES[scheme].weights.group_size == k
    return scheme.startswith(WEIGHT_ONLY) and not one_group


def tolerance(scheme: str, dtype: torch.dtype) -> float:
    if scheme.endswith("dynamic-asym"):
        return DYNAMIC_ASYMMETRIC_TOLERANCE
    if "o8" in scheme:
        return OUTPUT_GRID_TOLERANCES[dtype]
    return TOLERANCES[dtype]


@dataclass(frozen=True)
class Case:
    """One of upstream's layers, and the checkpoint's layers that fill it."""

    name: str
    k: int
    shards: dict[str, int]  # N of each
    build: Callable[..., Any]

    @property
    def shard_ids(self) -> list[str | int | None]:
        if self.name == "qkv_proj":
            return ["q", "k", "v"]
        if self.name == "gate_up_proj":
            return [0, 1]
        return [None]


def qkv_case(hidden: int, heads: int, kv_heads: int) -> Case:
    def build(**kwargs: Any) -> QKVParallelLinear:
        return QKVParallelLinear(hidden, HEAD_SIZE, heads, kv_heads, **kwargs)

    sizes = (heads * HEAD_SIZE, kv_heads * HEAD_SIZE, kv_heads * HEAD_SIZE)
    return Case("qkv_proj", hidden, dict(zip(FUSED["qkv_proj"], sizes)), build)


def gate_up_case(hidden: int, intermediate: int) -> Case:
    def build(**kwargs: Any) -> MergedColumnParallelLinear:
        return MergedColumnParallelLinear(hidden, [intermediate] * 2, **kwargs)

    shards = dict.fromkeys(FUSED["gate_up_proj"], intermediate)
    return Case("gate_up_proj", hidden, shards, build)


def row_case(k: int, n: int) -> Case:
    def build(**kwargs: Any) -> RowParallelLinear:
        return RowParallelLinear(k, n, **kwargs)

    return Case("down_proj", k, {"down_proj": n}, build)


def replicated_case(k: int, n: int) -> Case:
    def build(**kwargs: Any) -> ReplicatedLinear:
        return ReplicatedLinear(k, n, **kwargs)

    return Case("out_proj", k, {"out_proj": n}, build)


def activations(tokens: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Make activations with a mean other than 0, as after a gated unit."""
    return (torch.randn(tokens, k) + 0.3).to(dtype)


def compressed_modules(
    case: Case, scheme: str, dtype: torch.dtype, bias: bool
) -> torch.nn.ModuleDict:
    """Quantize the checkpoint's layers with the compressed-tensors library."""
    modules = torch.nn.ModuleDict(
        {name: torch.nn.Linear(case.k, n, bias) for name, n in case.shards.items()}
    ).to(dtype)
    low, high = activations(64, case.k, dtype).aminmax()
    for module in prepare(modules, {"Linear": scheme}):
        set_range(module, "input", low, high)
        set_range(module, "output", *OUTPUT_RANGE)
    return modules


def load_tensors(case: Case, layer: Any, modules: torch.nn.ModuleDict) -> None:
    """Load the checkpoint's tensors into a layer through its weight loaders."""
    parameters = dict(layer.named_parameters())
    for shard_id, module in zip(case.shard_ids, modules.values()):
        for name, tensor in module.named_parameters():
            loader = parameters[name].weight_loader
            shard = () if shard_id is None else (shard_id,)
            loader(parameters[name], tensor.data.clone(), *shard)


def load(
    case: Case, scheme: str, dtype: torch.dtype, bias: bool, **kwargs: Any
) -> tuple[Any, list[FormulaLinear]]:
    """Build and load one of upstream's layers.

    Returns:
        The layer, ready to run, and the formula of each of its shards.

    """
    modules = compressed_modules(case, scheme, dtype, bias)
    schemes = {name: module.quantization_scheme for name, module in modules.items()}
    compress(modules)
    config = get_quantization_config("compressed-tensors").from_config(
        QuantizationConfig.from_pretrained(modules).model_dump()
    )
    config.packed_modules_mapping = FUSED
    get_current_vllm_config().compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(dtype):
        layer = case.build(
            bias=bias, quant_config=config, prefix=f"{PREFIX}.{case.name}", **kwargs
        )
        load_tensors(case, layer, modules)
        layer.quant_method.process_weights_after_loading(layer)
    if is_weight_only(scheme, getattr(layer, "input_size_per_partition", case.k)):
        schemes = {
            name: served.model_copy(update={"input_activations": None})
            for name, served in schemes.items()
        }
    formulas = [
        formula_linear(module, schemes[name]) for name, module in modules.items()
    ]
    if layouts.chosen("w8a8-static") == RECIPROCAL and "o8" not in scheme:
        formulas = [replace(formula, reciprocal_dtype=dtype) for formula in formulas]
    return layer, formulas


def config_of(target: str, scheme: str, **fields: Any) -> Any:
    """Make a config that quantizes one target."""
    group = ALL_SCHEMES[scheme].model_copy(update={"targets": [target]}).model_dump()
    pack = "a16" in scheme or scheme.endswith("packed")
    return get_quantization_config("compressed-tensors").from_config(
        {
            "config_groups": {"group_0": group},
            "format": "pack-quantized" if pack else "int-quantized",
            **fields,
        }
    )


def compressed_table(module: Any, scheme: str, dtype: torch.dtype) -> Any:
    """Quantize an embedding or output head."""
    modules = torch.nn.ModuleDict({"layer": module}).to(dtype)
    for prepared in prepare(modules, {type(module).__name__: scheme}):
        set_range(prepared, "input", *OUTPUT_RANGE)
    compress(modules)
    return modules["layer"]


def load_table(layer: Any, module: Any) -> None:
    """Load the checkpoint's tensors into an embedding or output head."""
    parameters = dict(layer.named_parameters())
    for name, tensor in module.named_parameters():
        parameters[name].weight_loader(parameters[name], tensor.data.clone())


def _load_vocabulary(
    layer_class: Any,
    module: Any,
    hidden: int,
    scheme: str,
    dtype: torch.dtype,
    built: Callable[[Any], None] = lambda layer: None,
) -> tuple[Any, FormulaLinear]:
    module = compressed_table(module, scheme, dtype)
    size = getattr(module, "out_features", 0) or module.num_embeddings
    config = config_of("re:vocabulary", scheme)
    with set_default_torch_dtype(dtype):
        layer = layer_class(size, hidden, quant_config=config, prefix="vocabulary")
        built(layer)
        load_table(layer, module)
        layer.quant_method.process_weights_after_loading(layer)
    formula = formula_linear(module, ALL_SCHEMES[scheme])
    if scheme in FLOAT_SCHEMES:
        formula.input_args = None
    return layer, formula


def load_embedding(
    size: int, hidden: int, scheme: str, dtype: torch.dtype, **options: Any
) -> tuple[Any, FormulaLinear]:
    """Build and load one of upstream's embeddings."""
    module = torch.nn.Embedding(size, hidden)
    return _load_vocabulary(
        VocabParallelEmbedding, module, hidden, scheme, dtype, **options
    )


def load_head(
    size: int, hidden: int, scheme: str, dtype: torch.dtype
) -> tuple[Any, FormulaLinear]:
    """Build and load one of upstream's output heads."""
    module = torch.nn.Linear(hidden, size, bias=False)
    return _load_vocabulary(ParallelLMHead, module, hidden, scheme, dtype)
