# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of a checkpoint's `quantization_config`, before upstream reads it."""

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

# That say nothing of how a layer's weights are stored.
_NO_FORMATS = (CompressionFormat.dense.value, CompressionFormat.mixed_precision.value)
# As compressed-tensors calls and called it.
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
    """Refuse what would be misread, ignored or fail without a reason.

    Raises:
        UnsupportedCheckpointError: Names the field.

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
        # The version of a package, not of the format: what it added to the format
        # is refused by its field.
        logger.warning_once(
            "The checkpoint was written by compressed-tensors %s, of a later major "
            "version than %s, which reads it.",
            version,
            known,
        )


def _check_sparsity(config: dict[str, Any]) -> None:
    if pruned := config.get("moe_sparsity_config"):
        raise _refused(
            "Layers have experts removed, and vLLM would route tokens to experts that "
            "are not there",
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
            "none, or dense: zeros that are stored like other values",
        )


def _check_structure(config: dict[str, Any]) -> None:
    for field, value in config.items():
        if field not in _FIELDS and value:
            # `warning_once` keeps its arguments, which have to be hashable.
            logger.warning_once(
                "quantization_config.%s=%.80s is not known and not used.",
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
            f"compressed-tensors {compressed_tensors.__version__} cannot read it: "
            f"{detail:.500}",
            "config_groups",
            "what this version of compressed-tensors reads",
        ) from error


def _check_activation_order(config: dict[str, Any]) -> None:
    for name, group in (config.get("config_groups") or {}).items():
        weights = isinstance(group, dict) and group.get("weights")
        actorder = weights.get("actorder") if isinstance(weights, dict) else None
        if actorder is True or str(actorder).lower() in _PERMUTED:
            raise _refused(
                "Weights in the order of their activations need a permutation "
                "(g_idx), which no NPU operator takes",
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
                "The format is not served", f"{field}={fmt}", ", ".join(served)
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
                "Weights alone are quantized, in a format for quantized activations",
                f"{field}.format={fmt}",
                f"format={CompressionFormat.pack_quantized.value}",
            )
        scheme = {key: value for key, value in group.items() if key != "targets"}
        for target in group["targets"]:
            _check_pattern(target, f"{field}.targets={target}")
            if schemes.setdefault(target, scheme) != scheme:
                raise _refused(
                    "The target is in two groups with different schemes",
                    f"{field}.targets={target}",
                    "one scheme for a target",
                    Remedy.CORRECT_FIELD.format(field=f"{field}.targets"),
                )


def _is_attention(group: dict[str, Any]) -> bool:
    """Whether upstream skips the group, with a warning: it is about the KV cache."""
    targets = group.get("targets") or []
    return len(targets) == 1 and targets[0].endswith("Attention")


def has_scalar_kv_scales(config: dict[str, Any]) -> bool:
    """Whether each of the KV cache's scales in a checkpoint is one number."""
    groups = (config.get("config_groups") or {}).values()
    schemes = [
        config.get("kv_cache_scheme"),
        *(group.get("input_activations") for group in groups if _is_attention(group)),
    ]
    return all(scheme.get("strategy") == "tensor" for scheme in schemes if scheme)


def _check_pattern(target: str, field: str) -> None:
    if target.startswith("re:"):
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise _refused(
                f"The pattern does not compile: {error}",
                field,
                "regular expressions, as Python's re has them",
                Remedy.CORRECT_FIELD.format(field=field.partition("=")[0]),
            ) from error


def _check_transforms(config: dict[str, Any]) -> None:
    if not config:
        return
    for name, scheme in TransformConfig.model_validate(config).config_groups.items():
        for args in scheme.apply:
            if args.is_online():
                raise _refused(
                    f"The {scheme.type} transform has to be computed while the model "
                    "runs, and there is no kernel for it",
                    f"transform_config.config_groups.{name}.apply.location="
                    f"{args.location}",
                    "transforms already merged into the weights (weight_input, "
                    "weight_output)",
                )
