# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What this package raises: what is wrong, where, what is supported, what to do."""

import functools
from typing import Any


class OperatorLimitError(RuntimeError):
    """A call that the NPU operator would refuse or compute wrongly."""


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
        self._parts = {"where": where, "supported": supported, "remedy": remedy}
        self._what = what

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied and pickled (Ray, process pools) by its arguments,
        # which are the text alone.
        make = functools.partial(type(self), **self._parts)
        return make, (self._what,), self.__dict__


class PlatformError(_FourPartError, RuntimeError):
    """The asked-for platform cannot run here."""


class UnsupportedCheckpointError(_FourPartError, NotImplementedError):
    """A checkpoint that cannot be served as its config says.

    Not a ValueError: upstream takes that, for an lm_head, to mean "not quantized".
    """


def broken_checkpoint(what: str, where: str) -> UnsupportedCheckpointError:
    """Refuse a checkpoint that is not what its config says."""
    return UnsupportedCheckpointError(
        what,
        where=where,
        supported="tensors as config.json's quantization_config describes them",
        remedy="Download the checkpoint again, or have it written again",
    )
