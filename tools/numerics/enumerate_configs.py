# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Count the outcomes of every quantization config, for linear layers and experts.

    python -m tools.numerics.enumerate_configs

Passes each combination of bits x strategy x group size x symmetry x format x
activations to this package's config class and to upstream's, with the same kernels to
choose from. The outcome is a scheme with a kernel, or a refusal. Anything else is a
defect.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

BITS = (2, 3, 4, 5, 6, 7, 8)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "g16": {"strategy": "group", "group_size": 16},
    "g64": {"strategy": "group", "group_size": 64},
    "g256": {"strategy": "group", "group_size": 256},
    "block": {"strategy": "block", "block_structure": [64, 64]},
}
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "dense", "marlin-24")
_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
_TENSOR = {"num_bits": 8, "strategy": "tensor"}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"input_activations": _TOKEN},
    "token-asym": {"input_activations": {**_TOKEN, "symmetric": False}},
    "token-4": {"input_activations": {**_TOKEN, "num_bits": 4}},
    "tensor": {"input_activations": _TENSOR},
    "tensor-asym": {"input_activations": {**_TENSOR, "symmetric": False}},
    "tensor-in-out": {"input_activations": _TENSOR, "output_activations": _TENSOR},
    "tensor-out": {"output_activations": _TENSOR},
    "group": {
        "input_activations": {
            "num_bits": 8,
            "strategy": "group",
            "group_size": 64,
            "dynamic": True,
        }
    },
}
RESOLVED = "resolved to 16 bits"
K, N = 512, 64
EXPERTS, TOP_K = 4, 2


def _config(
    weights: dict[str, Any], activations: dict[str, Any], fmt: str
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
    }


def integer_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of integer weights, with a name."""
    for bits, layout, symmetric, fmt, activations in product(
        BITS, LAYOUTS, (True, False), FORMATS, ACTIVATIONS
    ):
        weights = {"num_bits": bits, "symmetric": symmetric, **LAYOUTS[layout]}
        config = _config(weights, ACTIVATIONS[activations], fmt)
        asymmetric = "" if symmetric else "-asym"
        yield f"w{bits}-{layout}{asymmetric} {fmt} {activations}", config


_FLOAT8_TOKEN = {**_TOKEN, "type": "float"}
_FLOAT_GROUP = {
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "dynamic": True,
}
FLOAT_LAYOUTS: dict[str, dict[str, Any]] = {
    **LAYOUTS,
    "g32": {"strategy": "group", "group_size": 32},
    "tensor-g16": {"strategy": "tensor_group", "group_size": 16},
}
FLOAT_FORMATS = (
    *("float-quantized", "naive-quantized", "int-quantized"),
    *("mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"),
)
FLOAT_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"input_activations": _FLOAT8_TOKEN},
    "tensor": {"input_activations": {**_TENSOR, "type": "float"}},
    **{
        f"group-{bits}": {"input_activations": {**_FLOAT_GROUP, "num_bits": bits}}
        for bits in (4, 8)
    },
    "int8-token": {"input_activations": _TOKEN},
    "tensor-in-out": {
        "input_activations": {**_TENSOR, "type": "float"},
        "output_activations": {**_TENSOR, "type": "float"},
    },
}


def float_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of floating-point weights, with a name."""
    for bits, layout, symmetric, scale, fmt, activations in product(
        (4, 6, 8),
        FLOAT_LAYOUTS,
        (True, False),
        (None, "torch.uint8", "torch.float8_e4m3fn"),
        FLOAT_FORMATS,
        FLOAT_ACTIVATIONS,
    ):
        weights = {
            "num_bits": bits,
            "type": "float",
            "symmetric": symmetric,
            "scale_dtype": scale,
            **FLOAT_LAYOUTS[layout],
        }
        config = _config(weights, FLOAT_ACTIVATIONS[activations], fmt)
        asymmetric = "" if symmetric else "-asym"
        yield f"fp{bits}-{layout}{asymmetric} {scale} {fmt} {activations}", config


def resolved(method: Any) -> str | None:
    """`RESOLVED` if a method resolves its weights to 16 bits, otherwise None."""
    from vllm_ascend_ct.quantization.compressed_tensors.resolved import ResolvedMixin

    return RESOLVED if isinstance(method, ResolvedMixin) else None


def linear(config: Any, dtype: Any) -> str:
    """Build a linear layer; return the names of its scheme and kernel."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    layer = ReplicatedLinear(
        K, N, params_dtype=dtype, quant_config=config, prefix="model.layers.0.fc"
    )
    if said := resolved(layer.quant_method):
        return said
    kernel: Any = getattr(layer.scheme, "kernel", None)
    return f"{type(layer.scheme).__name__} with {type(kernel).__name__}"


def experts(config: Any, dtype: Any) -> str:
    """Build experts; return the names of their method and class."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    get_current_vllm_config().compilation_config.static_forward_context.clear()
    runner = FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=K,
        intermediate_size=K,
        params_dtype=dtype,
        quant_config=config,
        prefix="model.layers.0.mlp.experts",
    )
    method: Any = runner.routed_experts.quant_method
    if said := resolved(method):
        return said
    weights = method.weights
    return f"{type(weights).__name__} with {weights.experts_cls.__name__}"


def outcome(
    config_class: Any,
    config: dict[str, Any],
    dtype: Any,
    build: Callable[[Any, Any], str] = linear,
) -> str:
    """Build a layer; return what it got, "refused", or the name of another error.

    Args:
        config_class: The quantization config class.
        config: `quantization_config` of a checkpoint.
        dtype: dtype of the layer.
        build: Builds a linear layer or experts.

    """
    from vllm_ascend_ct.errors import UnsupportedCheckpointError

    try:
        return build(config_class.from_config(config), dtype)
    except UnsupportedCheckpointError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}{'' if str(error) else ' without a text'}"


def count(
    config_class: Any,
    dtype: Any,
    build: Callable[[Any, Any], str] = linear,
    configs: Callable[[], Iterator[tuple[str, dict[str, Any]]]] = integer_configs,
) -> Counter[str]:
    """Count the outcomes of all configs."""
    return Counter(
        outcome(config_class, config, dtype, build) for _, config in configs()
    )


def main() -> None:
    # Before anything imports vLLM.
    os.environ["VLLM_PLUGINS"] = "ascend_ct"
    os.environ["VLLM_ASCEND_CT_EMULATE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

    import torch
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins
    from vllm.utils.network_utils import get_open_port

    from tools.stacks.ranks import tensor_parallel

    logging.disable(logging.WARNING)
    load_general_plugins()
    ours = get_quantization_config("compressed-tensors")
    with tensor_parallel(rank=0, world_size=1, port=get_open_port()):
        for configs, build, config_class in product(
            (integer_configs, float_configs),
            (linear, experts),
            (ours, ours.__mro__[1]),
        ):
            outcomes = count(config_class, torch.bfloat16, build, configs)
            title = f"{config_class.__name__}, {configs.__name__}, {build.__name__}"
            print(f"{title}: {outcomes.total()} configs")
            for name, number in outcomes.most_common():
                print(f"  {number:5}  {name}")


if __name__ == "__main__":
    main()
