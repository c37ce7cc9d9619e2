# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of a layer against the names and sizes of the checkpoint's tensors.

vLLM does not name a tensor that a fused layer has no place for, and does not notice a
bias that is missing. Where vLLM calls a layer otherwise than the file does, nothing is
checked here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors import CompressionFormat

from vllm_ascend_ct.errors import broken_checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.loading import (
    OPTIONAL,
    QuantizedShape,
)

_DTYPES = {
    "I8": torch.int8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
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


class CheckpointHeaders:
    """The tensors of a checkpoint's quantized layers: kind to shape, by layer.

    And kind to dtype, which is one of safetensors' names.
    """

    def __init__(self, headers: Mapping[str, dict[str, Any]]) -> None:
        """Sort tensors by layer.

        Args:
            headers: `shape` and more of each tensor, by name.

        """
        layers: dict[str, dict[str, list[int]]] = defaultdict(dict)
        self._dtypes: dict[str, str] = {}
        for name, header in headers.items():
            layer, _, kind = name.rpartition(".")
            if layer:
                layers[layer][kind] = header["shape"]
                self._dtypes[name] = header["dtype"]
        self._layers = {
            layer: shapes
            for layer, shapes in layers.items()
            if shapes.keys() & _QUANTIZED
        }

    def has_quantized(self, name: str) -> bool:
        """Whether a layer whose name ends like this one's is quantized."""
        last = name.rpartition(".")[2]
        return any(layer.rpartition(".")[2] == last for layer in self._layers)

    def check_layer(self, parts: Iterable[str], scheme: dict[str, Any] | None) -> None:
        """Refuse a layer that has other tensors than its scheme means.

        Args:
            parts: Names that the layer's shards have in the checkpoint.
            scheme: As upstream's `get_scheme_dict` gives it.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        places = _places(scheme) if scheme else set()
        for part in parts:
            shapes = self._layers.get(part, {})
            if shapes and not scheme:
                kind = min(shapes.keys() & _QUANTIZED)
                raise broken_checkpoint(
                    "The layer is quantized, and the config does not say how "
                    "(config_groups, ignore)",
                    f"tensor {part}.{kind}",
                )
            for kind in sorted(shapes.keys() & _KNOWN - places):
                raise broken_checkpoint(
                    "The layer's scheme in the config has no such tensor",
                    f"tensor {part}.{kind}",
                )
            kind = "weight_packed" if "weight_packed" in shapes else "weight"
            weight, bias = shapes.get(kind), shapes.get("bias")
            if weight and bias and bias != weight[:1]:
                raise broken_checkpoint(
                    f"The bias is {bias}, the {kind} {weight}; expected as many rows",
                    f"tensor {part}.bias",
                )

    def check_experts(
        self,
        prefix: str,
        experts: Iterable[int],
        shards: Iterable[str],
        scheme: dict[str, Any] | None,
    ) -> None:
        """Refuse experts that are not all quantized as their scheme means.

        Args:
            prefix: Name of the layer.
            experts: Numbers of all of them.
            shards: Names of an expert's projections.
            scheme: Of the first; all have one.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        parts = [f"{prefix}.{expert}.{shard}" for expert in experts for shard in shards]
        self.check_layer(parts, scheme)
        quantized = [part in self._layers for part in parts]
        if any(quantized) and not all(quantized):
            part = parts[quantized.index(False)]
            raise broken_checkpoint(
                "Some experts of a layer are quantized, this one is missing or is not",
                f"tensor {part}.weight",
            )

    def check_tensors(
        self,
        part: str,
        scheme: dict[str, Any],
        shape: QuantizedShape,
        rows: int,
    ) -> None:
        """Refuse a shard of which a tensor is missing or is not what it has to be.

        For layers of which nothing looks at what is loaded. Values are not known here.

        Args:
            part: Name of the shard in the checkpoint.
            scheme: As upstream's `get_scheme_dict` gives it.
            shape: What its tensors have to look like.
            rows: Its output features.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        shapes = self._layers.get(part)
        if shapes is None:
            return
        for kind in sorted(_places(scheme) - {"bias", *OPTIONAL}):
            name = f"{part}.{kind}"
            if kind not in shapes:
                raise broken_checkpoint(
                    "A tensor of the layer is missing", f"tensor {name}"
                )
            dtype = _DTYPES.get(self._dtypes[name], torch.bool)
            tensor = torch.empty(shapes[kind], dtype=dtype, device="meta")
            if reason := shape.fault(kind, tensor, rows):
                raise broken_checkpoint(
                    f"The checkpoint's tensor {reason}", f"tensor {name}"
                )

    def check_bias(self, parts: Iterable[str]) -> None:
        """Refuse a layer with a bias that the checkpoint lacks.

        One shard alone may have none (vLLM fills it up) if it has none in any block.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        known = [part for part in parts if part in self._layers]
        without = [part for part in known if "bias" not in self._layers[part]]
        for part in without:
            if len(without) == len(known) or self._has_bias_elsewhere(part):
                raise broken_checkpoint(
                    "A tensor of the layer is missing", f"tensor {part}.bias"
                )

    def _has_bias_elsewhere(self, layer: str) -> bool:
        """Whether the same layer of another block has a bias."""
        pattern = re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(layer))
        return any(
            "bias" in shapes and re.fullmatch(pattern, other)
            for other, shapes in self._layers.items()
        )


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
        places.add("output_scale")
    return places
