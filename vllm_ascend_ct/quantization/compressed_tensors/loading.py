# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of a quantized layer's tensors while they are loaded.

vLLM checks only for unquantized models that every parameter was loaded. It accepts
tensors of another dtype or with too many rows, and has assertions without a message.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_ascend_ct.compat import load_format
from vllm_ascend_ct.errors import (
    Remedy,
    UnsupportedCheckpointError,
    broken_checkpoint,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import (
    FileLayer,
    LayerFiles,
)
from vllm_ascend_ct.quantization.compressed_tensors.load_formats import marked_scale
from vllm_ascend_ct.quantization.compressed_tensors.tensors import (
    COLUMNS,
    FIELDS,
    OPTIONAL,
    QuantizedShape,
    remedy_for,
)

_SHARDS = {"q": 0, "k": 1, "v": 2}
# Kinds of tensors that a layer has or lacks depending on the config.
_IMPLIED = (
    *("weight_zero_point", "weight_global_scale"),
    *("input_scale", "input_zero_point", "output_scale"),
)

_Shard = int | str | tuple[int, ...] | None


@dataclass
class LoadRecord:
    """Checks and records the tensors that a layer's weight loader is given.

    Attributes:
        layer: The layer.
        prefix: Its name.
        shape: Its expected tensors in the checkpoint.
        before: Called before each tensor is loaded.
        files: The layer's tensors in the files.
        loader: The wrapped weight loader, after `record`.
        optional: Parameters that need not be loaded.
        seen: Shards loaded so far, by name of the parameter.

    """

    layer: Any
    prefix: str
    shape: QuantizedShape
    before: Callable[[], None] = lambda: None
    files: LayerFiles = field(default_factory=LayerFiles)
    loader: Callable[..., Any] | None = None
    optional: tuple[str, ...] = OPTIONAL
    seen: dict[str, set[_Shard]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Read while the layer is built: later there may be no current vLLM config.
        self.is_dummy = load_format() == "dummy"

    def record(self, weight_loader: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a layer's weight loader so that it checks and records tensors."""
        self.loader = wrapped(weight_loader, self._load)
        return self.loader

    def _load(
        self,
        weight_loader: Callable[..., Any],
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.before()
        shard = next(iter((*args, *kwargs.values())), None)
        name = parameter_name(self.layer, param)
        if fault := self.shape.fault(name, loaded_weight, self._rows(shard)):
            raise self._refused(name, shard, *fault)
        loaded_weight = as_stored(loaded_weight, param)
        try:
            result = weight_loader(param, loaded_weight, *args, **kwargs)
        except (AssertionError, ValueError, IndexError) as error:
            reason = f"does not fit {list(param.shape)}: {error}"
            remedy = remedy_for(COLUMNS.get(name))
            raise self._refused(name, shard, reason, remedy) from error
        self.seen.setdefault(name, set()).add(shard)
        return result

    def check_complete(self) -> None:
        """Refuse a layer with missing tensors, and clear the record.

        Raises:
            UnsupportedCheckpointError: A tensor was not loaded; the error names it.

        """
        seen, self.seen = self.seen, {}
        if not seen and marked_scale(self.layer) is None:
            # The load format fills parameters without their weight loaders.
            return
        shards = set(range(len(getattr(self.layer, "output_sizes", ()))))
        for name, param in self.layer.named_parameters(recurse=False):
            is_other = getattr(param, "weight_loader", 0) != self.loader
            if name in self.optional or is_other:
                continue
            given = seen.get(name, set())
            missing = shards - {
                index for shard in given for index in shard_indices(shard)
            }
            if not given or (missing and None not in given):
                raise self._missing(name, missing if given else set())
        if not seen:
            raise self._missing("weight_scale", set())

    def _rows(self, shard: _Shard) -> int | None:
        """Output features of a shard in the checkpoint; None if not known."""
        layer = self.layer
        if hasattr(layer, "org_vocab_size"):
            return int(layer.org_vocab_size)
        if hasattr(layer, "total_num_kv_heads"):
            sizes = {
                "q": layer.total_num_heads * layer.head_size,
                "k": layer.total_num_kv_heads * layer.head_size,
                "v": layer.total_num_kv_heads * layer.v_head_size,
            }
            return sizes.get(str(shard))
        if hasattr(layer, "output_sizes") and shard is not None:
            return sum(layer.output_sizes[index] for index in shard_indices(shard))
        return int(layer.output_size)

    def _missing(self, name: str, shards: set[int]) -> UnsupportedCheckpointError:
        files = self.files
        known = files.of_shard(min(shards) if shards else None)
        which = f" for shards {sorted(shards)}" if shards else ""
        return missing_tensor(self.prefix, name, known, files.alike, which)

    def _refused(
        self, name: str, shard: _Shard, reason: str, remedy: str
    ) -> UnsupportedCheckpointError:
        of_shard = "" if shard is None else f" (shard {shard})"
        return broken_checkpoint(
            f"The checkpoint's {name}{of_shard} {reason}",
            f"layer {self.prefix}, tensor {name}",
            remedy,
        )


def wrapped(
    weight_loader: Callable[..., Any], load: Callable[..., Any]
) -> Callable[..., Any]:
    """Wrap a layer's weight loader without keeping the layer alive.

    For reloads vLLM keeps the loaders of all parameters, also those of models that are
    gone. It removes the layer from them only if they are its methods
    (`model_loader/reload/sanitize.py`).

    Args:
        weight_loader: The loader.
        load: A method that is called with `weight_loader` and its arguments. Its object
            must live as long as the layer.

    """
    outer, inner = _weak(load), _weak(weight_loader)

    def loader(*args: Any, **kwargs: Any) -> Any:
        return outer()(inner(), *args, **kwargs)

    functools.update_wrapper(loader, weight_loader)
    del loader.__wrapped__  # type: ignore[attr-defined]
    loader.__signature__ = inspect.signature(weight_loader)  # type: ignore[attr-defined]
    return loader


def _weak(function: Callable[..., Any]) -> Callable[[], Any]:
    if inspect.ismethod(function):
        return weakref.WeakMethod(function)
    return lambda: function


def as_stored(loaded_weight: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """View exponents (E8M0) as bytes, if these are what their parameter has.

    Copied to it in their own dtype, they would be converted to integers.
    """
    if loaded_weight.dtype == torch.float8_e8m0fnu != param.dtype:
        return loaded_weight.view(torch.uint8)
    return loaded_weight


def parameter_name(layer: torch.nn.Module, param: torch.Tensor) -> str:
    """Name of a parameter in its layer; "parameter" if the layer does not have it."""
    # `named_parameters` is slow, and a large model has a million tensors.
    for name, value in layer._parameters.items():
        if value is param:
            return name
    return "parameter"


def missing_tensor(
    layer_name: str,
    tensor: str,
    known: Sequence[FileLayer],
    alike: Iterable[FileLayer] = (),
    which: str = "",
) -> UnsupportedCheckpointError:
    """Make the error for a tensor that was not loaded.

    Args:
        layer_name: The layer's name in vLLM.
        tensor: Name of the tensor in the layer.
        known: Tensors in the files of the layer, or of the shard that lacks it.
        alike: If none are known, layers in the files that may be the same layer.
        which: Text that names the shards that lack it.

    """
    where = f"layer {layer_name}, tensor {tensor}"
    kind = tensor.rpartition(".")[2]
    for layer in known:
        if kind not in layer.shapes:
            # If only some shards lack the tensor, the config is not to blame.
            is_config = kind in _IMPLIED and not which
            return broken_checkpoint(
                "A tensor of the layer is missing",
                f"layer {layer_name}, tensor {layer.name}.{kind}",
                remedy_for(FIELDS[kind]) if is_config else Remedy.DOWNLOAD_AGAIN,
            )
    if known:
        return UnsupportedCheckpointError(
            f"vLLM's loader for this model did not load {known[0].name}.{kind}, which "
            "the checkpoint's files have",
            where=where,
            supported="models whose loaders load the quantized tensors",
            remedy=Remedy.OTHER_LOADER,
        )
    if names := sorted({layer.name for layer in alike}):
        return UnsupportedCheckpointError(
            f"Nothing was loaded into the layer's {tensor}; the checkpoint's files "
            f"have {', '.join(names)}",
            where=where,
            supported="layers that are quantized in the files as config.json says",
            remedy=Remedy.COMPARE,
        )
    return broken_checkpoint(f"The checkpoint's {tensor} is missing{which}", where)


def shard_indices(shard: _Shard) -> tuple[int, ...]:
    """Indices of the shards that a weight loader's argument names; none for all."""
    if isinstance(shard, tuple):
        return shard
    if isinstance(shard, int):
        return (shard,)
    return (_SHARDS[shard],) if shard in _SHARDS else ()
