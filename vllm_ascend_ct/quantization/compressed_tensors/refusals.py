# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Errors that refuse a layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm_ascend_ct.errors import PlatformError, Remedy, UnsupportedCheckpointError
from vllm_ascend_ct.ops.soc import current_soc


def refused(
    what: str, layer_name: str | None, remedy: str = Remedy.QUANTIZE_AGAIN
) -> UnsupportedCheckpointError:
    """Make the error for a layer that is not supported.

    Args:
        what: What is not supported.
        layer_name: The layer's name in vLLM.
        remedy: What the user should do.

    """
    return UnsupportedCheckpointError(
        # Upstream's error texts may have several lines.
        " ".join(what.split()),
        where=f"layer {layer_name} on Ascend {current_soc().value}",
        supported="the schemes of the support matrix, within the chip's limits",
        remedy=remedy,
    )


def tied_otherwise(layer_name: str) -> UnsupportedCheckpointError:
    """Make the error for an output head tied to an embedding of another scheme."""
    return refused(
        "The output head is tied to an embedding that is not quantized in the same "
        "way, so its own weights would not be used",
        layer_name,
    )


@contextmanager
def enough_memory(layer_name: str | None) -> Iterator[None]:
    """Name the layer if the device's memory is too small to lay out its weights.

    Raises:
        PlatformError: It is.

    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # torch_npu goes on with settings of torch's allocator.
        reason = str(error).partition(".If ")[0]
        raise PlatformError(
            f"No memory is left to lay out a layer's weights: {reason}",
            where=f"layer {layer_name}",
            supported="devices with memory for all weights, and once more for those of "
            "one layer",
            remedy=Remedy.FREE_MEMORY,
        ) from error
