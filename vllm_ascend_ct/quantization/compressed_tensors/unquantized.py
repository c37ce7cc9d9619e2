# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of the unquantized layers of a quantized model.

vLLM's loaders copy integer tensors into unquantized weights without a complaint, and
some models' loaders skip tensors that they do not know, like those of a layer that the
checkpoint's files have quantized.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_ascend_ct.errors import Remedy, broken_checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.loading import (
    missing_tensor,
    shard_indices,
    wrapped,
)

if TYPE_CHECKING:
    _Base = QuantizeMethodBase
else:
    _Base = object

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Marks the first column of a weight until it is loaded. Representable in 16-bit floats,
# and small, because padding keeps it.
_MARK = -(1 + 37 / 128) * 2**-10


class WatchedMixin(_Base):
    """Mixin before an unquantized method of vLLM or vllm-ascend, with load checks."""

    checkpoint: Checkpoint
    files: LayerFiles
    layer_name: str

    def watch(self, checkpoint: Checkpoint, layer_name: str, files: LayerFiles) -> Self:
        """Set the layer to check.

        Args:
            checkpoint: The model's checkpoint.
            layer_name: The layer's name in vLLM.
            files: The layer's tensors in the files.

        Returns:
            This method.

        """
        self.checkpoint = checkpoint
        self.layer_name = layer_name
        self.files = files
        # Shards that were loaded on the meta device, where weights have no mark.
        self._seen: set[Any] = set()
        return self

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        if (loader := attributes.get("weight_loader")) is not None:
            attributes["weight_loader"] = self._checking(loader)
        super().create_weights(layer, *args, **attributes)  # type: ignore[safe-super]
        for _, weight in _weights(layer):
            weight.data[..., 0] = _MARK

    def process_weights_after_loading(self, layer: Any) -> None:
        self.checkpoint.after_loading()
        for name, weight in _weights(layer):
            if self._is_unfilled(layer, weight) and self._is_in_file():
                known, alike = list(self.files.parts.values()), self.files.alike
                in_file = self._in_file(name)
                raise missing_tensor(self.layer_name, in_file, known, alike)
        self.files = LayerFiles()
        super().process_weights_after_loading(layer)

    def _checking(self, weight_loader: Callable[..., Any]) -> Callable[..., Any]:
        return wrapped(weight_loader, self._load)

    def _load(
        self,
        weight_loader: Callable[..., Any],
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.checkpoint.before_loading()
        if loaded_weight.dtype not in _FLOATS:
            raise broken_checkpoint(
                "The checkpoint has a tensor of "
                f"{loaded_weight.dtype} {list(loaded_weight.shape)} for a layer "
                "that config.json does not quantize",
                f"layer {self.layer_name}",
                Remedy.CORRECT_FIELD.format(field="`targets` or `ignore`"),
            )
        if param.is_meta:
            self._seen.add(next(iter((*args, *kwargs.values())), None))
        return weight_loader(param, loaded_weight, *args, **kwargs)

    def _is_unfilled(self, layer: Any, weight: torch.Tensor) -> bool:
        """Whether a shard or an expert of a weight was not loaded."""
        if not weight.is_meta:
            return _has_mark(layer, weight)
        shards = set(range(len(getattr(layer, "output_sizes", ()))))
        loaded = {index for shard in self._seen for index in shard_indices(shard)}
        # Without any, something else than the layer's loader may have loaded it.
        return bool(self._seen) and None not in self._seen and shards > loaded

    def _in_file(self, name: str) -> str:
        """Name in the files of the tensor that a weight is loaded from."""
        return name

    def _is_in_file(self) -> bool:
        """Whether the files have, or may have, the tensors of this layer.

        Some models build layers that no checkpoint has tensors for and that are unused.
        """
        files = self.files
        alike = any(layer.is_quantized for layer in files.alike)
        return alike or bool(files.parts) or not files.is_read


@functools.cache
def watched(method_class: Any, mixin: type[WatchedMixin] = WatchedMixin) -> Any:
    """Subclass an unquantized method so that it checks what is loaded.

    Args:
        method_class: The method. The subclass keeps its name, because vLLM's layers
            choose their weight loader by it.
        mixin: The mixin placed before the method in the MRO.

    """
    module = {"__module__": method_class.__module__}
    return type(method_class.__name__, (mixin, method_class), module)


def _weights(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in layer.named_parameters(recurse=False):
        is_there = parameter.numel() > 0 and parameter.dtype in _FLOATS
        if name.endswith("weight") and is_there:
            yield name, parameter


def _has_mark(layer: Any, weight: torch.Tensor) -> bool:
    """Whether a shard or an expert of a weight still has the mark of `_MARK`."""
    first = weight.data[..., 0]
    parts = list(first) if first.dim() > 1 else [first]
    sizes = getattr(layer, "output_partition_sizes", None)
    if first.dim() == 1 and sizes and sum(sizes) == len(first):
        parts = list(first.split(list(sizes)))
    return any(len(part) > 0 and bool((part == _MARK).all()) for part in parts)
