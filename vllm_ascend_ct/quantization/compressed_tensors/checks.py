# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of a checkpoint's `quantization_config` before upstream reads it."""

import re
from typing import Any

import compressed_tensors
from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from packaging.version import InvalidVersion, Version
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
    is_activation_quantization_format,
)

from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.rules import (
    FLOAT_RULES,
    SCHEME_RULES,
)

logger = init_logger("vllm.ascend_ct.quantization")

# Formats that do not say how a layer's weights are stored.
_NO_FORMATS = (CompressionFormat.dense.value, CompressionFormat.mixed_precision.value)
# Names of activation ordering by groups, in current and earlier compressed-tensors.
_PERMUTED = ("group", "dynamic")
_FIELDS = (
    *QuantizationConfig.model_fields,
    "sparsity_config",
    "transform_config",
    "version",
    # Added by vLLM.
    "total_num_heads",
    "total_num_kv_heads",
)


def check_config(config: dict[str, Any]) -> None:
    """Refuse a config that would be misread or ignored, or fail without an explanation.

    Args:
        config: `quantization_config` of config.json.

    Raises:
        UnsupportedCheckpointError: A field is not supported; the error names it.

    """
    _check_formats(config)
    _check_activation_order(config)
    _check_structure(config)
    _check_version(config)
    _check_sparsity(config)
    _check_groups(config)
    _check_transforms(config.get("transform_config") or {})


def _refused(
    what: str, field: str, supported: str, remedy: str = Remedy.QUANTIZE_AGAIN
) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        what,
        where=f"config.json, quantization_config.{field}",
        supported=supported,
        remedy=remedy,
    )


def _check_version(config: dict[str, Any]) -> None:
    known = Version(compressed_tensors.__version__)
    try:
        version = Version(str(config.get("version") or known))
    except InvalidVersion:
        return
    if version.major > known.major:
        # Only a warning, because this is the version of the package and not of the
        # format. Unknown additions to the format are refused by field.
        logger.warning_once(
            "The checkpoint was written by compressed-tensors %s, a later major "
            "version than the installed %s.",
            version,
            known,
        )


def _check_sparsity(config: dict[str, Any]) -> None:
    if pruned := config.get("moe_sparsity_config"):
        raise _refused(
            "Experts were pruned from some layers, but vLLM would still route tokens "
            "to them",
            f"moe_sparsity_config={pruned!s:.80}",
            "models in which all layers have the same experts",
        )
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict):
        sparsity = {"format": sparsity}
    fmt = sparsity.get("format", CompressionFormat.dense.value)
    if fmt != CompressionFormat.dense.value:
        raise _refused(
            "Sparse weights are not supported; compressed-tensors itself has dropped "
            "them",
            f"sparsity_config.format={fmt}",
            "no sparsity_config, or dense (zeros are stored like other values)",
        )


def _check_structure(config: dict[str, Any]) -> None:
    for field, value in config.items():
        if field not in _FIELDS and value:
            # `warning_once` requires hashable arguments.
            logger.warning_once(
                "quantization_config.%s=%.80s is not known and is ignored.",
                field,
                repr(value),
            )
    try:
        QuantizationConfig.model_validate({"config_groups": {}, **config})
        if transforms := config.get("transform_config"):
            TransformConfig.model_validate(transforms)
    except (ValueError, NotImplementedError, TypeError) as error:
        detail = " ".join(str(error).split())
        raise _refused(
            f"compressed-tensors {compressed_tensors.__version__} cannot read the "
            f"config: {detail:.500}",
            "config_groups",
            "configs that this version of compressed-tensors can read",
        ) from error


def _check_activation_order(config: dict[str, Any]) -> None:
    for name, group in (config.get("config_groups") or {}).items():
        weights = isinstance(group, dict) and group.get("weights")
        actorder = weights.get("actorder") if isinstance(weights, dict) else None
        if actorder is True or str(actorder).lower() in _PERMUTED:
            raise _refused(
                "Activation ordering needs a permutation of the inputs (g_idx), which "
                "no NPU operator supports",
                f"config_groups.{name}.weights.actorder={actorder}",
                "actorder=null, weight or static",
            )


def _check_formats(config: dict[str, Any]) -> None:
    groups = config.get("config_groups") or {}
    rules = (*SCHEME_RULES, *FLOAT_RULES)
    served = {fmt: None for rule in rules for fmt in rule.formats}
    formats = {"format": config.get("format")}
    for name, group in groups.items():
        if isinstance(group, dict):
            formats[f"config_groups.{name}.format"] = group.get("format")
    for field, fmt in formats.items():
        if fmt is not None and fmt not in (*served, *_NO_FORMATS):
            raise _refused(
                "The format is not supported", f"{field}={fmt}", ", ".join(served)
            )


def _check_groups(config: dict[str, Any]) -> None:
    for pattern in config.get("ignore") or []:
        _check_pattern(pattern, f"ignore={pattern}")
    schemes: dict[str, Any] = {}
    for name, group in (config.get("config_groups") or {}).items():
        field = f"config_groups.{name}"
        inputs = isinstance(group, dict) and group.get("input_activations")
        if isinstance(group, dict) and _is_attention(group):
            continue
        if not isinstance(group, dict) or not group.get("weights"):
            raise _refused(
                "The group does not say how weights are quantized",
                f"{field}.weights",
                "groups with targets and weights",
                Remedy.CORRECT_FIELD.format(field=field),
            )
        fmt = group.get("format") or config.get("format")
        is_integer = group["weights"].get("type", "int") == "int"
        for_activations = is_activation_quantization_format(str(fmt))
        if is_integer and for_activations and not inputs:
            raise _refused(
                "Only weights are quantized, but the format is for quantized "
                "activations",
                f"{field}.format={fmt}",
                f"format={CompressionFormat.pack_quantized.value}",
            )
        scheme = {key: value for key, value in group.items() if key != "targets"}
        for target in group["targets"]:
            _check_pattern(target, f"{field}.targets={target}")
            if schemes.setdefault(target, scheme) != scheme:
                raise _refused(
                    "Two groups with different schemes have the same target",
                    f"{field}.targets={target}",
                    "one scheme per target",
                    Remedy.CORRECT_FIELD.format(field=f"{field}.targets"),
                )


def _is_attention(group: dict[str, Any]) -> bool:
    """Whether a group is for the KV cache; upstream skips it with a warning."""
    targets = group.get("targets") or []
    return len(targets) == 1 and targets[0].endswith("Attention")


def _check_pattern(target: str, field: str) -> None:
    if target.startswith("re:"):
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise _refused(
                f"The pattern does not compile: {error}",
                field,
                "regular expressions of Python's re module",
                Remedy.CORRECT_FIELD.format(field=field.partition("=")[0]),
            ) from error


def _check_transforms(config: dict[str, Any]) -> None:
    if not config:
        return
    for name, scheme in TransformConfig.model_validate(config).config_groups.items():
        for args in scheme.apply:
            if args.is_online():
                raise _refused(
                    f"The {scheme.type} transform must be computed at run time, and "
                    "there is no kernel for it",
                    f"transform_config.config_groups.{name}.apply.location="
                    f"{args.location}",
                    "transforms already merged into the weights (weight_input, "
                    "weight_output)",
                )
