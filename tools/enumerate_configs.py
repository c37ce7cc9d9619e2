# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Ask what becomes of every quantization config of a linear layer.

    python -m tools.enumerate_configs

Each config of bits x strategy x group size x symmetry x format x activations is given
to this package's config class and to upstream's, with the same kernels to choose from.
The outcome is a scheme with a kernel, a refusal, or something else: a defect.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
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
K, N = 512, 64


def integer_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination, with a name."""
    for bits, layout, symmetric, fmt, activations in product(
        BITS, LAYOUTS, (True, False), FORMATS, ACTIVATIONS
    ):
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": bits, "symmetric": symmetric, **LAYOUTS[layout]},
            **ACTIVATIONS[activations],
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": fmt,
            "config_groups": {"group_0": group},
        }
        asymmetric = "" if symmetric else "-asym"
        yield f"w{bits}-{layout}{asymmetric} {fmt} {activations}", config


def outcome(config_class: Any, config: dict[str, Any], dtype: Any) -> str:
    """Build a linear layer; say which scheme and kernel it got or what was raised."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_ascend_ct.errors import UnsupportedCheckpointError

    try:
        made = config_class.from_config(config)
        layer = ReplicatedLinear(
            K, N, params_dtype=dtype, quant_config=made, prefix="model.layers.0.fc"
        )
    except UnsupportedCheckpointError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}{'' if str(error) else ' without a text'}"
    kernel: Any = getattr(layer.scheme, "kernel", None)
    return f"{type(layer.scheme).__name__} with {type(kernel).__name__}"


def count(config_class: Any, dtype: Any) -> Counter[str]:
    """Count the outcomes of all configs."""
    return Counter(
        outcome(config_class, config, dtype) for _, config in integer_configs()
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

    from tools.ranks import tensor_parallel

    logging.disable(logging.WARNING)
    load_general_plugins()
    ours = get_quantization_config("compressed-tensors")
    with tensor_parallel(rank=0, world_size=1, port=get_open_port()):
        for config_class in (ours, ours.__mro__[1]):
            outcomes = count(config_class, torch.bfloat16)
            print(f"{config_class.__name__}: {outcomes.total()} configs")
            for name, number in outcomes.most_common():
                print(f"  {number:5}  {name}")


if __name__ == "__main__":
    main()
