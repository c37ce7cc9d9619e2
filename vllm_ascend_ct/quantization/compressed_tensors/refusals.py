# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Errors that refuse a layer."""

from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError
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
