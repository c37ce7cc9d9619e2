# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Load formats that bypass weight loaders, saving of models, and dummy weights."""

import math
from typing import Any

import torch

from vllm_ascend_ct.compat import load_format
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError

# Load formats whose weights a running model has repacked already: saved by it, or sent
# by vllm-ascend over the network and written to layers after they are repacked.
_PROCESSED = (
    *("sharded_state", "runai_streamer_sharded", "tensorizer"),
    *("netloader", "rfork"),
)
_DUMMY_SCALE = 1e-4
# E8M0, in bytes.
_ONE, _NOT_A_NUMBER = 127, 255


def check_load_format(layer_name: str) -> None:
    """Refuse load formats whose weights are repacked already.

    Args:
        layer_name: Name of a quantized layer, for the error text.

    Raises:
        UnsupportedCheckpointError: The load format is one of them.

    """
    if (given := load_format()) in _PROCESSED:
        raise UnsupportedCheckpointError(
            "This load format transfers quantized weights that a running model has "
            "already repacked for its kernels, so they would be repacked twice, or "
            "checked before they arrive",
            where=f"layer {layer_name}, --load-format {given}",
            supported="load formats that read the checkpoint's own tensors, and dummy",
            remedy=Remedy.LOAD_CHECKPOINT,
        )


def refuse_saving(layer: torch.nn.Module) -> Any:
    """Make saving a model that contains a layer raise an error.

    Returns:
        A handle that removes the check.

    """
    return layer.register_state_dict_pre_hook(_check_saving)


def _check_saving(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse to save a model that contains a repacked layer.

    A hook that runs before a layer's `state_dict`. vLLM's weight offloading calls
    `state_dict` of single blocks. This is allowed, and recognized by the prefix, which
    then lacks the number of the block.

    Raises:
        UnsupportedCheckpointError: `state_dict` was called on the whole model.

    """
    name = str(getattr(module, "prefix", getattr(module, "layer_name", "")))
    if _numbers(name) <= _numbers(prefix):
        raise UnsupportedCheckpointError(
            "The model's weights are repacked for the NPU and cannot be saved in this "
            "form: loading them would repack them again",
            where=f"layer {name}",
            supported="saving models without quantized layers",
            remedy=Remedy.LOAD_CHECKPOINT,
        )


def _numbers(name: str) -> set[str]:
    return {part for part in name.split(".") if part.isdigit()}


def mark_scales(layer: torch.nn.Module) -> None:
    """Fill the scales of weights with NaN, to see later whether they were loaded."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name.endswith("weight_scale"):
            is_exponent = parameter.dtype == torch.uint8
            parameter.data.fill_(_NOT_A_NUMBER if is_exponent else math.nan)


def marked_scale(layer: torch.nn.Module) -> str | None:
    """Name of a scale that still has the values of `mark_scales`, or None."""
    for name, parameter in layer.named_parameters(recurse=False):
        if not name.endswith("weight_scale"):
            continue
        # On the meta device only weight loaders fill parameters.
        if parameter.is_meta or bool(_is_marked(parameter.data).any()):
            return str(name)
    return None


def _is_marked(scale: torch.Tensor) -> torch.Tensor:
    return scale == _NOT_A_NUMBER if scale.dtype == torch.uint8 else scale.isnan()


def make_dummy(layer: torch.nn.Module, bits: int) -> None:
    """Replace dummy weights by values that are valid in a quantized layer.

    vLLM draws random floats, negative ones too, and leaves integers uninitialized.

    Args:
        layer: The layer, with parameters in the checkpoint's layout.
        bits: Weight width.

    """
    for name, parameter in layer.named_parameters(recurse=False):
        data = parameter.data
        if name.endswith("_scale") and data.dtype == torch.uint8:
            data.fill_(_ONE)
        elif data.dtype == torch.uint8:
            data.random_()
        elif name.endswith("_scale"):
            data.abs_().clamp_(min=_DUMMY_SCALE)
        elif name.endswith("zero_point"):
            data.zero_()
        elif name.endswith("weight") and data.dtype == torch.int8:
            data.random_(-(1 << (bits - 1)), 1 << (bits - 1))
        elif data.dtype == torch.int32:
            data.random_(-(1 << 31), 1 << 31)
