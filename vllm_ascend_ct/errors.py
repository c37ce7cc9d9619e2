# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Errors of this package: what is wrong, where, what is supported and what to do."""

import functools
from enum import StrEnum
from typing import Any


class Remedy(StrEnum):
    """Instructions for the user, one member for each cause of a refusal.

    The caller fills in names in braces with `format`.
    """

    ADD_TO_IGNORE = (
        "Add {patterns} to `ignore` of config.json's quantization_config, or export "
        "the checkpoint again with the layer quantized"
    )
    REMOVE_FROM_IGNORE = (
        "Remove or narrow {patterns} in `ignore` of config.json's quantization_config: "
        "it matches {layer}, the layer's name in vLLM"
    )
    ADD_TO_TARGETS = (
        "Add {patterns} to the `targets` of the group that describes the layer, in "
        "config.json's quantization_config"
    )
    CORRECT_FIELD = (
        "Correct {field} in config.json's quantization_config, or export the "
        "checkpoint again"
    )
    ONE_SCHEME = (
        "Give them the same scheme: if the checkpoint's files store them alike, "
        "correct `targets` or `ignore` of config.json's quantization_config; otherwise "
        "quantize the model again"
    )
    EXPORT_AGAIN = "Export the checkpoint again"
    EXPORT_ALIKE = (
        "Export the checkpoint again, with either all of them or none of them quantized"
    )
    QUANTIZE_AGAIN = "Quantize the model again with a supported scheme"
    LEAVE_UNQUANTIZED = (
        "Quantize the model again with the layer in the recipe's `ignore`"
    )
    OTHER_DTYPE = (
        "Serve the model with --dtype bfloat16; if it already was, download the "
        "checkpoint again"
    )
    RESOLVE = (
        "Unset {variable}, or quantize the model again with a supported integer scheme"
    )
    MORE_MEMORY = (
        "Serve it on more devices (tensor_parallel_size), or quantize the model again "
        "with an integer scheme, whose weights keep their size in the NPU's memory"
    )
    FREE_MEMORY = (
        "Stop other processes on the device, which `npu-smi info` lists, or serve the "
        "model on more devices (tensor_parallel_size)"
    )
    KV_CACHE = (
        "Calibrate the scales of the KV cache again, or serve the model with "
        "--kv-cache-dtype bfloat16, which does not use them"
    )
    CALIBRATE_AGAIN = "Calibrate and quantize the model again"
    CHANGE_RANKS = (
        "Change tensor_parallel_size, or quantize the model again so that the sizes "
        "divide evenly among the ranks"
    )
    DOWNLOAD_AGAIN = "Download the checkpoint again, or export it again"
    OTHER_LOADER = (
        "Use a vLLM release whose loader for this model accepts quantized tensors with "
        "these names, or export the checkpoint in the form that this release accepts"
    )
    COMPARE = (
        "Compare these names with `ignore` and `targets` of config.json's "
        "quantization_config and correct them, or use a vLLM release whose loader for "
        "this model accepts tensors with these names"
    )
    LOAD_CHECKPOINT = (
        "Serve the original checkpoint, with a --load-format that reads its files"
    )
    LORA_TARGETS = (
        "Limit LoRA with --lora-target-modules to modules that do not include the "
        "experts"
    )
    NO_QUANTIZATION = "Remove --quantization from the command line"
    WITHOUT_PLUGIN = "Serve this model without ascend_ct in VLLM_PLUGINS"


class OperatorLimitError(RuntimeError):
    """A call that the NPU operator would reject or compute incorrectly."""


_PARTS = ("where", "supported", "remedy")


class _FourPartError(Exception):
    """An error whose text has four parts: `what (where). Supported: .... Remedy.`.

    Args:
        what: What is wrong.
        where: The layer and field, or the setting, with its value.
        supported: What would be accepted.
        remedy: What the user should do.

    """

    def __init__(self, what: str, *, where: str, supported: str, remedy: str) -> None:
        super().__init__(f"{what} ({where}). Supported: {supported}. {remedy}.")
        self.what, self.where = what, where
        self.supported, self.remedy = supported, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is pickled (Ray, process pools) and copied with its
        # positional arguments, which here are only the text.
        parts = {name: self.__dict__[name] for name in _PARTS}
        return functools.partial(type(self), **parts), (self.what,), self.__dict__


class PlatformError(_FourPartError, RuntimeError):
    """The requested platform, release or setting is not supported here."""


class UnsupportedCheckpointError(_FourPartError, NotImplementedError):
    """A checkpoint that cannot be served the way its config describes.

    Not a ValueError: for an lm_head, upstream interprets that as "not quantized".
    """


def broken_checkpoint(
    what: str, where: str, remedy: str = Remedy.DOWNLOAD_AGAIN
) -> UnsupportedCheckpointError:
    """Make the error for tensors that do not match the checkpoint's config.

    Args:
        what: What is wrong.
        where: The tensor, and usually the layer.
        remedy: What the user should do.

    """
    return UnsupportedCheckpointError(
        what,
        where=where,
        supported="tensors as config.json's quantization_config describes them",
        remedy=remedy,
    )
