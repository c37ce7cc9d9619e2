# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of what a checkpoint gives for a quantized layer, tensor by tensor.

vLLM checks that every parameter was loaded for unquantized models only, takes tensors
of another dtype or with too many rows, and asserts without a text.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none

from vllm_ascend_ct.errors import UnsupportedCheckpointError, broken_checkpoint

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_SHARDS = {"q": 0, "k": 1, "v": 2}
# Formats that go through the weight loaders of a layer's parameters; others may not.
_CHECKED_LOAD_FORMATS = (
    "auto",
    "hf",
    "fastsafetensors",
    "instanttensor",
    "mistral",
    "npcache",
    "pt",
    "runai_streamer",
    "safetensors",
)
# Upstream registers it and reads it nowhere; not all who write checkpoints write it.
OPTIONAL = ("weight_shape",)

_Shard = int | str | tuple[int, ...] | None


@dataclass(frozen=True)
class QuantizedShape:
    """What the checkpoint's tensors of a layer have to look like.

    Attributes:
        k: Input features, of all ranks.
        bits: Of a weight.
        groups: Scales in a row of the weight; 0 for one scale in all.
        zero_is_none: Whether a static scale of 0 says "not quantized".

    """

    k: int
    bits: int
    groups: int
    zero_is_none: bool = False

    def fault(self, name: str, tensor: torch.Tensor, rows: int | None) -> str | None:
        """Why a tensor cannot be right, or None.

        Args:
            name: Of the parameter.
            tensor: As it is in the checkpoint.
            rows: Output features of the layer or of the shard, of all ranks; None if
                not known.

        """
        if name == "weight_shape":
            given = tensor.reshape(-1).tolist()
            if len(given) != 2 or given[1] != self.k or rows not in (None, given[0]):
                return f"says {given}; expected [{rows or 'any'}, {self.k}]"
            return None
        if expected := self._expected(name, rows):
            dtypes, shape = expected
            if tensor.dtype not in dtypes or not _fits(tensor.shape, shape):
                wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
                size = [-1 if s is None else s for s in shape]
                return (
                    f"is {str(tensor.dtype).removeprefix('torch.')} "
                    f"{list(tensor.shape)}; expected {wanted} {size}"
                    + _dense_hint(name, self.bits)
                )
        return self._value_fault(name, tensor)

    def _expected(
        self, name: str, rows: int | None
    ) -> tuple[tuple[torch.dtype, ...], tuple[int | None, ...]] | None:
        if name == "weight_packed":
            return (torch.int32,), (rows, math.ceil(self.k * self.bits / 32))
        if name == "weight":
            return (torch.int8,), (rows, self.k)
        if name == "weight_zero_point":
            words = rows and math.ceil(rows * self.bits / 32)
            return (torch.int32,), (words, self.groups)
        if name == "weight_scale" and self.groups:
            return _FLOATS, (rows, self.groups)
        if name.endswith("_scale"):
            return _FLOATS, ()
        if name == "input_zero_point":
            return (torch.int8, torch.int32, torch.int64), ()
        if name == "bias":
            return _FLOATS, (rows,)
        return None

    def _value_fault(self, name: str, tensor: torch.Tensor) -> str | None:
        # Weights have no value that is wrong, and reading them all takes time.
        if not name.endswith(("_scale", "input_zero_point")):
            return None
        if tensor.is_meta or tensor.numel() == 0:
            return None
        low, high = (float(value) for value in tensor.aminmax())
        if name == "input_zero_point" and not (low >= -128 and high <= 127):
            return f"is {low:.0f}; expected -128 to 127"
        if name.endswith("_scale"):
            zero = self.zero_is_none and name != "weight_scale"
            if not ((low > 0 or (zero and low == 0)) and high < math.inf):
                return f"has values from {low} to {high}; expected finite and above 0"
        return None


def _fits(shape: torch.Size, expected: tuple[int | None, ...]) -> bool:
    if not expected:
        return shape.numel() == 1
    return len(shape) == len(expected) and all(
        size in (given, None) for given, size in zip(shape, expected)
    )


def _dense_hint(name: str, bits: int) -> str:
    if name == "weight_packed" and bits in (3, 5, 6, 7):
        return f" (compressed-tensors packs {bits} bits without gaps since 0.18)"
    return ""


def is_filled_by_loader() -> bool:
    """Whether a layer that was given no tensor at all has none."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return True
    return str(vllm_config.load_config.load_format) in _CHECKED_LOAD_FORMATS


@dataclass
class LoadRecord:
    """What a layer's weight loader was given."""

    layer: Any
    prefix: str
    shape: QuantizedShape
    loader: Callable[..., Any] | None = None
    seen: dict[str, set[_Shard]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # While the layer is built; there may be no config when it is processed.
        self.is_filled = is_filled_by_loader()

    def record(self, weight_loader: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a layer's weight loader so that it checks and records."""

        @functools.wraps(weight_loader)
        def load(
            param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            shard = next(iter((*args, *kwargs.values())), None)
            name = self._name(param)
            reason = self.shape.fault(name, loaded_weight, self._rows(shard))
            if reason is not None:
                raise self._refused(name, shard, reason)
            try:
                result = weight_loader(param, loaded_weight, *args, **kwargs)
            except (AssertionError, ValueError, IndexError) as error:
                reason = f"does not fit {list(param.shape)}: {error}"
                raise self._refused(name, shard, reason) from error
            self.seen.setdefault(name, set()).add(shard)
            return result

        self.loader = load
        return load

    def check_complete(self) -> None:
        """Refuse a layer of which tensors were missing, and start anew.

        Raises:
            UnsupportedCheckpointError: Names the tensor.

        """
        seen, self.seen = self.seen, {}
        if not seen and not self.is_filled:
            return
        shards = set(range(len(getattr(self.layer, "output_sizes", ()))))
        for name, param in self.layer.named_parameters(recurse=False):
            if name in OPTIONAL or getattr(param, "weight_loader", 0) != self.loader:
                continue
            given = seen.get(name, set())
            missing = shards - {index for shard in given for index in _indices(shard)}
            if not given or (missing and None not in given):
                which = f" of shards {sorted(missing)}" if given else ""
                raise self._refused(name, None, f"is missing{which}")

    def _name(self, param: torch.Tensor) -> str:
        for name, value in self.layer.named_parameters(recurse=False):
            if value is param:
                return str(name)
        return "parameter"

    def _rows(self, shard: _Shard) -> int | None:
        """Output features that the checkpoint has for a shard, None if not known."""
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
            return sum(layer.output_sizes[index] for index in _indices(shard))
        return int(layer.output_size)

    def _refused(
        self, name: str, shard: _Shard, reason: str
    ) -> UnsupportedCheckpointError:
        of_shard = "" if shard is None else f" (shard {shard})"
        return broken_checkpoint(
            f"The checkpoint's {name}{of_shard} {reason}",
            f"layer {self.prefix}, tensor {name}",
        )


def _indices(shard: _Shard) -> tuple[int, ...]:
    if isinstance(shard, tuple):
        return shard
    if isinstance(shard, int):
        return (shard,)
    return (_SHARDS[shard],) if shard in _SHARDS else ()
