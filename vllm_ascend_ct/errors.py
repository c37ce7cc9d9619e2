# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What this package raises: what is wrong, where, what is supported, what to do."""


def four_parts(what: str, where: str, supported: str, remedy: str) -> str:
    """Compose an error text."""
    return f"{what} ({where}). Supported: {supported}. {remedy}."


class OperatorLimitError(RuntimeError):
    """A call that the NPU operator would refuse or compute wrongly."""


class PlatformError(RuntimeError):
    """The asked-for platform cannot run here."""

    def __init__(self, what: str, *, where: str, supported: str, remedy: str) -> None:
        super().__init__(four_parts(what, where, supported, remedy))


class UnsupportedCheckpointError(NotImplementedError):
    """A checkpoint that cannot be served as its config says.

    Not a ValueError: upstream takes that, for an lm_head, to mean "not quantized".
    """

    def __init__(self, what: str, *, where: str, supported: str, remedy: str) -> None:
        super().__init__(four_parts(what, where, supported, remedy))


def broken_checkpoint(what: str, where: str) -> UnsupportedCheckpointError:
    """Refuse a checkpoint that is not what its config says."""
    return UnsupportedCheckpointError(
        what,
        where=where,
        supported="tensors as config.json's quantization_config describes them",
        remedy="Download the checkpoint again, or have it written again",
    )
