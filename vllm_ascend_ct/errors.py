# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What this package raises: what is wrong, where, what is supported, what to do."""

import functools
from enum import StrEnum
from typing import Any


class Remedy(StrEnum):
    """What to do about a refusal, one member for each cause.

    A text in braces is filled in by `format`.
    """

    ADD_TO_IGNORE = (
        "Add {patterns} to `ignore` of config.json's quantization_config, or export "
        "the checkpoint again with the layer quantized"
    )
    REMOVE_FROM_IGNORE = (
        "Remove or narrow {patterns} in `ignore` of config.json's quantization_config: "
        "it matches {layer}, as vLLM calls the layer"
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
        "Give them one scheme: correct `targets` or `ignore` of config.json's "
        "quantization_config if the file has them alike, else quantize the model again"
    )
    EXPORT_AGAIN = "Export the checkpoint again"
    EXPORT_ALIKE = "Export the checkpoint again, with all of them quantized or none"
    QUANTIZE_AGAIN = "Quantize the model again with a supported scheme"
    LEAVE_UNQUANTIZED = (
        "Quantize the model again with the layer in the recipe's `ignore`"
    )
    OTHER_DTYPE = (
        "Serve the model with --dtype bfloat16 if it was not, else download the "
        "checkpoint again"
    )
    RESOLVE = (
        "Unset {variable}, or quantize the model again with a supported integer scheme"
    )
    MORE_MEMORY = (
        "Serve it on more devices (tensor_parallel_size), or quantize the model again "
        "with an integer scheme, whose weights stay as small as they are"
    )
    CALIBRATE_AGAIN = "Calibrate and quantize the model again"
    CHANGE_RANKS = (
        "Change tensor_parallel_size, or quantize the model again with sizes that "
        "ranks can divide"
    )
    DOWNLOAD_AGAIN = "Download the checkpoint again, or have it written again"
    OTHER_LOADER = (
        "Use a vLLM whose loader of this model takes quantized tensors of these names, "
        "or export the checkpoint as this one takes it"
    )
    COMPARE = (
        "Compare these names with `ignore` and `targets` of config.json's "
        "quantization_config and correct them, or use a vLLM whose loader of this "
        "model takes tensors of these names"
    )
    LOAD_CHECKPOINT = (
        "Serve the checkpoint itself, with a --load-format that reads its files"
    )
    LORA_TARGETS = (
        "Name the modules that adapters are for with --lora-target-modules, experts "
        "not among them"
    )
    NO_QUANTIZATION = "Leave out --quantization"
    WITHOUT_PLUGIN = "Serve this model without ascend_ct in VLLM_PLUGINS"


class OperatorLimitError(RuntimeError):
    """A call that the NPU operator would refuse or compute wrongly."""


_PARTS = ("where", "supported", "remedy")


class _FourPartError(Exception):
    """An error whose text has the four parts.

    Args:
        what: What is wrong.
        where: Layer and field, or setting, with its value.
        supported: What would be accepted.
        remedy: What the reader should do.

    """

    def __init__(self, what: str, *, where: str, supported: str, remedy: str) -> None:
        super().__init__(f"{what} ({where}). Supported: {supported}. {remedy}.")
        self.what, self.where = what, where
        self.supported, self.remedy = supported, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied and pickled (Ray, process pools) by its arguments,
        # which are the text alone.
        parts = {name: self.__dict__[name] for name in _PARTS}
        return functools.partial(type(self), **parts), (self.what,), self.__dict__


class PlatformError(_FourPartError, RuntimeError):
    """The asked-for platform cannot run here."""


class UnsupportedCheckpointError(_FourPartError, NotImplementedError):
    """A checkpoint that cannot be served as its config says.

    Not a ValueError: upstream takes that, for an lm_head, to mean "not quantized".
    """


def broken_checkpoint(
    what: str, where: str, remedy: str = Remedy.DOWNLOAD_AGAIN
) -> UnsupportedCheckpointError:
    """Refuse a checkpoint that is not what its config says."""
    return UnsupportedCheckpointError(
        what,
        where=where,
        supported="tensors as config.json's quantization_config describes them",
        remedy=remedy,
    )
