# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks that the checkpoint's files agree with its config, layer by layer.

vLLM does not name a tensor that a fused layer has no parameter for, does not notice a
missing bias, and some models' loaders skip tensors that they do not know.
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

# The tensors in the files of a layer and its shards, by their names in vLLM.
Parts = Mapping[str, FileLayer]


def places(scheme: dict[str, Any]) -> set[str]:
    """The kinds of tensors that a layer with this scheme may have in the files."""
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
    """Refuse a layer whose tensors in the files do not match its scheme.

    Args:
        layer_name: The layer's name in vLLM.
        parts: The layer's tensors in the files.
        scheme: The layer's scheme from upstream's `get_scheme_dict`; None if it is not
            quantized.
        ignore: `ignore` of the config.
        headers: Headers of the whole checkpoint.

    Raises:
        UnsupportedCheckpointError: A tensor does not match; the error names it.

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
    """Refuse a layer if the config gives its parts different schemes.

    Args:
        what: What the parts are, for the error text.
        layer_name: The layer's name in vLLM.
        schemes: The parts' schemes from upstream's `get_scheme_dict`, by name.
        ignore: `ignore` of the config.
        headers: Headers of the whole checkpoint; None if not known.

    Raises:
        UnsupportedCheckpointError: Two schemes differ; the error names the parts.

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
    """Refuse experts whose tensors in the files do not match their scheme.

    Args:
        layer_name: The name of the experts in vLLM.
        files: The experts' tensors in the files.
        scheme: Scheme of all experts; None if they are not quantized.
        ignore: `ignore` of the config.
        headers: Headers of the whole checkpoint.

    Raises:
        UnsupportedCheckpointError: A tensor does not match; the error names it.

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
                    "Some experts of a layer are quantized, but this one is missing",
                    f"tensor {name}.weight",
                )


def check_bias(files: LayerFiles) -> None:
    """Refuse a layer with a bias parameter if the checkpoint lacks the bias.

    A single shard may lack it in all blocks; vLLM then fills it in.

    Args:
        files: The layer's tensors in the files.

    Raises:
        UnsupportedCheckpointError: A bias is missing; the error names the tensor.

    """
    known = list(files.parts.values())
    without = [layer for layer in known if "bias" not in layer.shapes]
    for layer in without:
        if len(without) == len(known) or layer.name in files.biased:
            raise broken_checkpoint(
                "A tensor of the layer is missing", f"tensor {layer.name}.bias"
            )


def check_unquantized(layer_name: str, layer: FileLayer) -> None:
    """Check a layer that vLLM's model builds without its quantization config.

    Args:
        layer_name: The layer's name in vLLM.
        layer: The layer's tensors in the files.

    Raises:
        UnsupportedCheckpointError: The layer is quantized in the files.

    """
    if layer.is_quantized:
        raise UnsupportedCheckpointError(
            "The checkpoint's files have quantized weights for a layer that vLLM's "
            "model never quantizes",
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
        # No config describes a layer with both.
        remedy = Remedy.EXPORT_AGAIN
    elif field is not None:
        remedy = Remedy.CORRECT_FIELD.format(field=field)
    raise broken_checkpoint(
        "The checkpoint's files have a tensor that the layer's scheme in config.json "
        "does not use",
        f"tensor {layer.name}.{kind}",
        remedy,
    )


def _check_bias_rows(layer: FileLayer) -> None:
    kind = "weight_packed" if "weight_packed" in layer.shapes else "weight"
    weight, bias = layer.shapes.get(kind), layer.shapes.get("bias")
    if weight and bias and bias != weight[:1]:
        raise broken_checkpoint(
            f"The bias has shape {bias} and the {kind} {weight}; expected the same "
            "number of rows",
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
        "The layer is quantized in the checkpoint's files, but config.json does not "
        "say how (config_groups, ignore)",
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
    """Make the error for a quantized layer whose files have unquantized tensors.

    Args:
        layer_name: The layer's name in vLLM.
        plain: The unquantized parts of the layer.
        mixed: Whether other parts are quantized.
        headers: Headers of the whole checkpoint.
        kind: Kind of tensor to name; other than "weight" for experts in one tensor.

    """
    first = next(iter(plain.values()))
    where = f"tensor {first.name}.{kind}, layer {layer_name}"
    if mixed:
        return broken_checkpoint(
            "Some parts of the layer are quantized in the checkpoint's files, but this "
            "one is not",
            where,
            Remedy.EXPORT_ALIKE,
        )
    # Experts that share one tensor have no names of their own in the files.
    patterns = [f"re:.*{layer_name}[.].*"]
    if kind == "weight":
        patterns = patterns_of(plain, headers)
    return broken_checkpoint(
        "config.json quantizes a layer that is not quantized in the checkpoint's files",
        where,
        Remedy.ADD_TO_IGNORE.format(patterns=quoted(patterns)),
    )
