# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Layers that are not quantized, beside quantized ones.

Their loaders take integers for what they are not, and some models' loaders leave out
tensors that they do not know, those of a layer that the file has quantized.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_ascend_ct.errors import Remedy, broken_checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.checkpoint import Checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.loading import missing_tensor

if TYPE_CHECKING:
    _Base = QuantizeMethodBase
else:
    _Base = object

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# In the first column of a weight until it is loaded. A number of 16-bit floats, small
# in case that it stays in padding.
_MARK = -(1 + 37 / 128) * 2**-10


class WatchedMixin(_Base):
    """First base of an unquantized method of vLLM's or vllm-ascend's."""

    checkpoint: Checkpoint
    files: LayerFiles
    layer_name: str

    def watch(self, checkpoint: Checkpoint, layer_name: str, files: LayerFiles) -> Self:
        """Begin to watch a layer.

        Args:
            checkpoint: The model's.
            layer_name: As vLLM calls it.
            files: What the file has of it.

        """
        self.checkpoint = checkpoint
        self.layer_name = layer_name
        self.files = files
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
            if _has_mark(layer, weight) and self._is_in_file():
                known, alike = list(self.files.parts.values()), self.files.alike
                in_file = self._in_file(name)
                raise missing_tensor(self.layer_name, in_file, known, alike)
        self.files = LayerFiles()
        super().process_weights_after_loading(layer)

    def _checking(self, weight_loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(weight_loader)
        def load(
            param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.checkpoint.before_loading()
            if loaded_weight.dtype not in _FLOATS:
                raise broken_checkpoint(
                    "A layer that the config does not quantize was given "
                    f"{loaded_weight.dtype} of {list(loaded_weight.shape)}",
                    f"layer {self.layer_name}",
                    Remedy.CORRECT_FIELD.format(field="`targets` or `ignore`"),
                )
            return weight_loader(param, loaded_weight, *args, **kwargs)

        return load

    def _in_file(self, name: str) -> str:
        """What the file has of a weight."""
        return name

    def _is_in_file(self) -> bool:
        """Whether the file has, or may have, what should have been loaded.

        Some models have layers that no checkpoint fills, and that nothing calls.
        """
        files = self.files
        alike = any(layer.is_quantized for layer in files.alike)
        return alike or bool(files.parts) or not files.is_read


@functools.cache
def watched(method_class: Any, mixin: type[WatchedMixin] = WatchedMixin) -> Any:
    """Make the class of an unquantized method that notices what the file has otherwise.

    Args:
        method_class: Its name is what tells vLLM's layers which loader to use.
        mixin: What comes before it.

    """
    module = {"__module__": method_class.__module__}
    return type(method_class.__name__, (mixin, method_class), module)


def _weights(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in layer.named_parameters(recurse=False):
        is_there = parameter.numel() > 0 and parameter.dtype in _FLOATS
        if name.endswith("weight") and is_there:
            yield name, parameter


def _has_mark(layer: Any, weight: torch.Tensor) -> bool:
    """Whether one of the shards or experts of a weight was not loaded."""
    if weight.is_meta:
        return False
    first = weight.data[..., 0]
    parts = list(first) if first.dim() > 1 else [first]
    sizes = getattr(layer, "output_partition_sizes", None)
    if first.dim() == 1 and sizes and sum(sizes) == len(first):
        parts = list(first.split(list(sizes)))
    return any(len(part) > 0 and bool((part == _MARK).all()) for part in parts)
