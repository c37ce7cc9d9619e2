# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of the names and sizes of a checkpoint's tensors.

vLLM does not name a tensor that a fused layer has no place for, and does not notice a
bias that is missing. The names are those of the file; where vLLM calls layers otherwise
nothing is refused here that could be loaded.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from compressed_tensors import CompressionFormat
from vllm.model_executor.layers.quantization.utils.config_utils import (
    is_equal_or_regex_match,
)

from vllm_ascend_ct.errors import UnsupportedCheckpointError

_QUANTIZED = {"weight_packed", "weight_scale"}
_KNOWN = {
    "bias",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
}


def check_headers(
    headers: Mapping[str, dict[str, Any]],
    schemes: Mapping[str, dict[str, Any]],
    ignore: Iterable[str],
) -> None:
    """Refuse tensors that no layer has a place for, and biases that do not fit.

    Args:
        headers: `shape` and more of all tensors in the checkpoint, by name.
        schemes: The config's, by target.
        ignore: The config's.

    Raises:
        UnsupportedCheckpointError: Names the tensor.

    """
    layers: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for name, header in headers.items():
        layer, _, kind = name.rpartition(".")
        if layer:
            layers[layer][kind] = header["shape"]
    targets = _Targets(schemes)
    of_layer = {layer: targets.find(layer) for layer in layers}
    same_names = any(target is not None for target in of_layer.values())
    for layer, shapes in layers.items():
        kinds = set(shapes)
        if not kinds & _QUANTIZED:
            continue
        if any(is_equal_or_regex_match(layer, pattern) for pattern in ignore):
            raise _refused(
                "The config says that the layer is not quantized, and it is",
                f"{layer}.weight_scale, quantization_config.ignore",
            )
        target = of_layer[layer] or targets.only_class
        if target is None:
            if same_names and not targets.has_class:
                raise _refused(
                    "No target of the config matches a quantized layer",
                    f"{layer}.weight_scale, quantization_config.config_groups",
                )
            continue
        for kind in sorted(
            kinds & (_KNOWN | {"weight_g_idx"}) - _places(schemes[target])
        ):
            raise _refused(
                "The config does not mean that the layer has this tensor",
                f"{layer}.{kind}, target {target}",
            )
    _check_biases(layers)


class _Targets:
    """The config's targets, classes apart from names."""

    def __init__(self, schemes: Mapping[str, dict[str, Any]]) -> None:
        self._names = [
            target for target in schemes if target.startswith("re:") or "." in target
        ]
        classes = [target for target in schemes if target not in self._names]
        self.has_class = bool(classes)
        self.only_class = classes[0] if len(classes) == 1 else None

    def find(self, layer: str) -> str | None:
        """The first target that matches a layer by name."""
        for target in self._names:
            if is_equal_or_regex_match(layer, target):
                return target
        return None


def _places(scheme: dict[str, Any]) -> set[str]:
    """The tensors that a layer of a scheme may have."""
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    places = {"weight_scale", "bias"}
    if scheme["format"] == CompressionFormat.pack_quantized.value:
        places |= {"weight_packed", "weight_shape"}
    else:
        places.add("weight")
    if not weights.symmetric:
        places.add("weight_zero_point")
    if inputs is not None and not inputs.dynamic:
        places.add("input_scale")
        if not inputs.symmetric:
            places.add("input_zero_point")
    if scheme.get("output_activations") is not None:
        places |= {"output_scale", "output_zero_point"}
    return places


def _check_biases(layers: Mapping[str, dict[str, list[int]]]) -> None:
    """Refuse a bias too long, or missing if the same layer of other blocks has one."""
    same: dict[str, list[str]] = defaultdict(list)
    for layer, shapes in layers.items():
        if shapes.keys() & _QUANTIZED:
            same[re.sub(r"\.\d+\.", ".N.", layer)].append(layer)
            kind = "weight_packed" if "weight_packed" in shapes else "weight"
            weight, bias = shapes.get(kind), shapes.get("bias")
            if weight and bias and bias != weight[:1]:
                raise _refused(
                    f"The bias is {bias}, the {kind} {weight}; expected as many rows",
                    f"{layer}.bias",
                )
    for blocks in same.values():
        without = [layer for layer in blocks if "bias" not in layers[layer]]
        if len(without) == 1 < len(blocks):
            raise _refused(
                "A tensor is missing that the same layer of every other block has",
                f"{without[0]}.bias",
            )


def _refused(what: str, tensor: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        what,
        where=f"tensor {tensor}",
        supported="tensors as config.json's quantization_config describes them",
        remedy="Download the checkpoint again, or have it written again",
    )
