# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Refusals of layers that the file has otherwise than the config says.

vLLM does not name a tensor that a fused layer has no place for, does not notice a bias
that is missing, and some models' loaders skip what they do not know.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_ascend_ct.errors import (
    Remedy,
    UnsupportedCheckpointError,
    broken_checkpoint,
)
from vllm_ascend_ct.quantization.compressed_tensors.config_remedies import (
    naming,
    pattern_of,
    patterns_of,
    quoted,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import (
    CheckpointHeaders,
    FileLayer,
    LayerFiles,
)
from vllm_ascend_ct.quantization.compressed_tensors.tensors import (
    FIELDS,
    FLOAT_INPUT_KINDS,
    float_kinds,
)
from vllm_ascend_ct.quantization.compressed_tensors.utils import (
    comparable_args,
    difference,
    is_float,
    is_packed,
)

# Of a layer: names that it and its shards have in vLLM, and what the file has.
Parts = Mapping[str, FileLayer]


def places(scheme: dict[str, Any]) -> set[str]:
    """The kinds of tensors that a layer of a scheme may have."""
    if is_float(scheme):
        return {"bias", *float_kinds(scheme), *FLOAT_INPUT_KINDS}
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    kinds = {"weight_scale", "bias"}
    if is_packed(scheme):
        kinds |= {"weight_packed", "weight_shape"}
    else:
        kinds.add("weight")
    if not weights.symmetric:
        kinds.add("weight_zero_point")
    if inputs is not None and not inputs.dynamic:
        kinds.add("input_scale")
        if not inputs.symmetric:
            kinds.add("input_zero_point")
    if scheme.get("output_activations") is not None:
        kinds.add("output_scale")
    return kinds


def check_layer(
    layer_name: str,
    parts: Parts,
    scheme: dict[str, Any] | None,
    ignore: Sequence[str],
    headers: CheckpointHeaders,
) -> None:
    """Refuse a layer that has other tensors than its scheme means.

    Args:
        layer_name: As vLLM calls the layer.
        parts: What the file has.
        scheme: As upstream's `get_scheme_dict` gives it.
        ignore: The config's.
        headers: Of the whole checkpoint.

    Raises:
        UnsupportedCheckpointError: Names the tensor.

    """
    if scheme is None:
        for name, layer in parts.items():
            if layer.is_quantized:
                raise _quantized_in_file(layer_name, name, layer, ignore, headers)
        return
    plain = {name: layer for name, layer in parts.items() if layer.is_plain}
    if plain:
        mixed = any(layer.is_quantized for layer in parts.values())
        raise _plain_in_file(layer_name, plain, mixed, headers)
    kinds = places(scheme)
    for layer in parts.values():
        _check_kinds(layer, kinds)
        _check_bias_rows(layer)


def check_one_scheme(
    what: str,
    layer_name: str,
    schemes: Mapping[str, dict[str, Any] | None],
    ignore: Sequence[str],
    headers: CheckpointHeaders | None,
) -> None:
    """Refuse parts of a layer that the config quantizes differently.

    Args:
        what: Name of the parts.
        layer_name: As vLLM calls the layer.
        schemes: As upstream's `get_scheme_dict` gives them, by the parts' names.
        ignore: The config's.
        headers: Of the checkpoint, if they are known.

    Raises:
        UnsupportedCheckpointError: Names a part.

    """
    first, *others = schemes
    differs = [
        o
        for o in others
        if comparable_args(schemes[o]) != comparable_args(schemes[first])
    ]
    if not differs:
        return
    other = differs[0]
    where = f"layer {layer_name}"
    remedy: str = Remedy.ONE_SCHEME
    if headers is not None:
        parts = headers.files(list(schemes)).parts
        for name, layer in parts.items():
            remedy = Remedy.EXPORT_ALIKE
            if layer.is_quantized and schemes[name] is None:
                where = f"tensor {layer.quantized_tensor}, layer {layer_name}"
                remedy = naming(name, layer, ignore, headers)
                break
            if layer.is_plain and schemes[name] is not None:
                where = f"tensor {layer.name}.weight, layer {layer_name}"
                pattern = quoted([pattern_of(name, layer, headers)])
                remedy = Remedy.ADD_TO_IGNORE.format(patterns=pattern)
                break
    raise UnsupportedCheckpointError(
        f"{what} are quantized differently: "
        f"{difference(first, schemes[first], schemes[other])}, "
        f"{difference(other, schemes[other], schemes[first])}",
        where=where,
        supported="one scheme for all of them",
        remedy=remedy,
    )


def check_experts(
    layer_name: str,
    files: LayerFiles,
    scheme: dict[str, Any] | None,
    ignore: Sequence[str],
    headers: CheckpointHeaders,
) -> None:
    """Refuse experts that are not all quantized as their scheme means.

    Args:
        layer_name: As vLLM calls the layer.
        files: What the file has.
        scheme: Of the first; all have one.
        ignore: The config's.
        headers: Of the whole checkpoint.

    Raises:
        UnsupportedCheckpointError: Names the tensor.

    """
    parts = {name: layer for name, layer in files.parts.items() if name != layer_name}
    fused = files.parts.get(layer_name)
    if scheme is not None and fused and (kind := fused.fused_experts):
        raise _plain_in_file(layer_name, {layer_name: fused}, False, headers, kind)
    check_layer(layer_name, parts, scheme, ignore, headers)
    if any(layer.is_quantized for layer in parts.values()):
        for name in files.shards:
            if name not in parts or not parts[name].is_quantized:
                raise broken_checkpoint(
                    "Some experts of a layer are quantized, this one is missing",
                    f"tensor {name}.weight",
                )


def check_bias(files: LayerFiles) -> None:
    """Refuse a layer with a bias that the checkpoint lacks.

    One shard alone may have none (vLLM fills it up) if it has none in any block.

    Raises:
        UnsupportedCheckpointError: Names the tensor.

    """
    known = list(files.parts.values())
    without = [layer for layer in known if "bias" not in layer.shapes]
    for layer in without:
        if len(without) == len(known) or layer.name in files.biased:
            raise broken_checkpoint(
                "A tensor of the layer is missing", f"tensor {layer.name}.bias"
            )


def check_unquantized(layer_name: str, layer: FileLayer) -> None:
    """Refuse a layer that vLLM's model builds without asking for a scheme.

    Raises:
        UnsupportedCheckpointError: The file has it quantized.

    """
    if layer.is_quantized:
        raise UnsupportedCheckpointError(
            "The file has a layer quantized that vLLM's model never quantizes",
            where=f"tensor {layer.quantized_tensor}, layer {layer_name}",
            supported="layers to which the model passes its quantization config",
            remedy=Remedy.LEAVE_UNQUANTIZED,
        )


def _check_kinds(layer: FileLayer, kinds: set[str]) -> None:
    unknown = layer.shapes.keys() & FIELDS.keys() - kinds
    if not unknown:
        return
    kind = min(unknown)
    field = FIELDS[kind]
    remedy: str = Remedy.QUANTIZE_AGAIN
    if {"weight", "weight_packed"} <= layer.shapes.keys():
        # Right under no config.
        remedy = Remedy.EXPORT_AGAIN
    elif field is not None:
        remedy = Remedy.CORRECT_FIELD.format(field=field)
    raise broken_checkpoint(
        "The layer's scheme in the config has no such tensor",
        f"tensor {layer.name}.{kind}",
        remedy,
    )


def _check_bias_rows(layer: FileLayer) -> None:
    kind = "weight_packed" if "weight_packed" in layer.shapes else "weight"
    weight, bias = layer.shapes.get(kind), layer.shapes.get("bias")
    if weight and bias and bias != weight[:1]:
        raise broken_checkpoint(
            f"The bias is {bias}, the {kind} {weight}; expected as many rows",
            f"tensor {layer.name}.bias",
            Remedy.EXPORT_AGAIN,
        )


def _quantized_in_file(
    layer_name: str,
    name: str,
    layer: FileLayer,
    ignore: Sequence[str],
    headers: CheckpointHeaders,
) -> UnsupportedCheckpointError:
    return broken_checkpoint(
        "The file has the layer quantized, and the config does not say how "
        "(config_groups, ignore)",
        f"tensor {layer.quantized_tensor}, layer {layer_name}",
        naming(name, layer, ignore, headers),
    )


def _plain_in_file(
    layer_name: str,
    plain: Parts,
    mixed: bool,
    headers: CheckpointHeaders,
    kind: str = "weight",
) -> UnsupportedCheckpointError:
    """Refuse a layer that is not quantized, or of which some shards are not."""
    first = next(iter(plain.values()))
    where = f"tensor {first.name}.{kind}, layer {layer_name}"
    if mixed:
        return broken_checkpoint(
            "Some parts of a layer are quantized in the file, this one is not",
            where,
            Remedy.EXPORT_ALIKE,
        )
    # Experts in one tensor have no names of their own in the file.
    patterns = [f"re:.*{layer_name}[.].*"]
    if kind == "weight":
        patterns = patterns_of(plain, headers)
    return broken_checkpoint(
        "The config quantizes a layer that is not quantized in the file",
        where,
        Remedy.ADD_TO_IGNORE.format(patterns=quoted(patterns)),
    )
