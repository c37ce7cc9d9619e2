# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""How weights come to parameters and leave them, other than by weight loaders."""

import math
from typing import Any

import torch

from vllm_ascend_ct.compat import load_format
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError

# Formats of weights that come from a running model, as its kernels have them: saved, or
# over vllm-ascend's network, which are written over layers that are laid out already.
_PROCESSED = (
    *("sharded_state", "runai_streamer_sharded", "tensorizer"),
    *("netloader", "rfork"),
)
_DUMMY_SCALE = 1e-4


def check_load_format(layer_name: str) -> None:
    """Refuse formats whose weights have a layout already.

    Raises:
        UnsupportedCheckpointError: The load format is one.

    """
    if (given := load_format()) in _PROCESSED:
        raise UnsupportedCheckpointError(
            "Quantized weights that come from a running model are laid out for it, and "
            "would be laid out again, or be checked before they come",
            where=f"layer {layer_name}, --load-format {given}",
            supported="formats that read the checkpoint's own tensors, and dummy",
            remedy=Remedy.LOAD_CHECKPOINT,
        )


def refuse_saving(layer: torch.nn.Module) -> Any:
    """Have a model refuse to be saved that has a layer; a handle that undoes it."""
    return layer.register_state_dict_pre_hook(_check_saving)


def _check_saving(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse to save a model one of whose layers is laid out.

    A hook before a layer's `state_dict`. vLLM's offloading asks blocks for theirs, in
    which a layer's name has no block's number.

    Raises:
        UnsupportedCheckpointError: The whole model's state was asked for.

    """
    name = str(getattr(module, "prefix", getattr(module, "layer_name", "")))
    if _numbers(name) <= _numbers(prefix):
        raise UnsupportedCheckpointError(
            "The model's weights are laid out for the NPU and cannot be saved as they "
            "are: they would be laid out again when they are loaded",
            where=f"layer {name}",
            supported="saving models without quantized layers",
            remedy=Remedy.LOAD_CHECKPOINT,
        )


def _numbers(name: str) -> set[str]:
    return {part for part in name.split(".") if part.isdigit()}


def mark_scales(layer: torch.nn.Module) -> None:
    """Fill the scales of weights with what no checkpoint has, until they are loaded."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name.endswith("weight_scale"):
            parameter.data.fill_(math.nan)


def marked_scale(layer: torch.nn.Module) -> str | None:
    """Name of a parameter that `mark_scales` filled and nothing else did, or None."""
    for name, parameter in layer.named_parameters(recurse=False):
        if not name.endswith("weight_scale"):
            continue
        # On the meta device only a weight loader fills parameters.
        if parameter.is_meta or bool(parameter.data.isnan().any()):
            return str(name)
    return None


def make_dummy(layer: torch.nn.Module, bits: int) -> None:
    """Make dummy weights such that a quantized layer may have.

    vLLM draws floats, negative ones too, and leaves integers as the memory was.

    Args:
        layer: Its parameters have the checkpoint's layout.
        bits: Of a weight.

    """
    for name, parameter in layer.named_parameters(recurse=False):
        data = parameter.data
        if name.endswith("_scale"):
            data.abs_().clamp_(min=_DUMMY_SCALE)
        elif name.endswith("zero_point"):
            data.zero_()
        elif name.endswith("weight") and data.dtype == torch.int8:
            data.random_(-(1 << (bits - 1)), 1 << (bits - 1))
        elif data.dtype == torch.int32:
            data.random_(-(1 << 31), 1 << 31)
