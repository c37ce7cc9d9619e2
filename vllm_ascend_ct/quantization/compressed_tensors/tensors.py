# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Expected dtypes, shapes and values of a quantized layer's tensors in a checkpoint."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.quantization.compressed_tensors.utils import text
from vllm_ascend_ct.weights.float_quantized import E8M0_DTYPES, decoded_scale

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The config field that determines whether a layer has a tensor of each kind. None for
# g_idx (activation ordering), which is not supported at all.
FIELDS = {
    "weight": "format",
    "weight_packed": "format",
    "weight_shape": "format",
    "weight_scale": "weights",
    "weight_zero_point": "weights.symmetric",
    "weight_global_scale": "weights.strategy",
    "weight_g_idx": None,
    "input_global_scale": "input_activations",
    "input_scale": "input_activations",
    "input_zero_point": "input_activations.symmetric",
    "output_scale": "output_activations",
    "output_zero_point": "output_activations.symmetric",
}
# The config fields that determine the number of columns of each kind of tensor.
COLUMNS = {
    "weight_packed": "weights.num_bits",
    "weight_scale": "weights.strategy or group_size",
    "weight_zero_point": "weights.strategy, group_size or num_bits",
    "input_scale": "input_activations.strategy",
    "input_zero_point": "input_activations.strategy",
}
# Upstream registers it but never reads it, and not every tool writes it.
OPTIONAL = ("weight_shape",)
# Input scales of layers with floating-point weights. Inputs stay in 16 bits, so these
# are not read. For experts that got no tokens during calibration they may have any
# value.
FLOAT_INPUT_KINDS = ("input_scale", "input_global_scale")


class Fault(NamedTuple):
    """What is wrong with a tensor, and what the user should do."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class QuantizedShape:
    """Expected tensors of a layer in the checkpoint.

    Attributes:
        k: Input features of the layer, before it is split among ranks.
        bits: Weight width.
        groups: Number of scales per row of the weight; 0 for a per-tensor scale.
        zero_is_none: Whether a static scale of 0 means "not quantized".

    """

    k: int
    bits: int
    groups: int
    zero_is_none: bool = False

    def fault(self, name: str, tensor: torch.Tensor, rows: int | None) -> Fault | None:
        """Why a tensor cannot be correct, or None.

        Args:
            name: Name of the layer's parameter that the tensor is for.
            tensor: The tensor in the checkpoint.
            rows: Output features of the layer, or of the fused layer's shard, before it
                is split among ranks; None if not known.

        """
        if name == "weight_shape":
            if tensor.numel() != 2:
                reason = f"has {tensor.numel()} numbers; expected 2"
                return Fault(reason, Remedy.EXPORT_AGAIN)
            if tensor.is_meta:
                return None
            given = tensor.reshape(-1).tolist()
            if given[1] != self.k or rows not in (None, given[0]):
                reason = f"says {given}; expected [{rows or 'any'}, {self.k}]"
                return Fault(reason, Remedy.EXPORT_AGAIN)
        elif expected := self._expected(name, rows):
            dtypes, shape = expected
            if tensor.dtype not in dtypes or not _fits(tensor.shape, shape):
                wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
                size = [-1 if s is None else s for s in shape]
                reason = (
                    f"is {str(tensor.dtype).removeprefix('torch.')} "
                    f"{list(tensor.shape)}; expected {wanted} {size}"
                    + _dense_hint(name, self.bits)
                )
                rows_fit = _fits(tensor.shape[:1], shape[:1]) or tensor.numel() == 1
                field = self._field(name, rows_fit)
                is_config = tensor.dtype in dtypes
                return Fault(reason, remedy_for(field if is_config else None))
        if value := self._value_fault(name, tensor):
            return Fault(value, Remedy.CALIBRATE_AGAIN)
        return None

    def _field(self, name: str, rows_fit: bool) -> str | None:
        """The config field that may be wrong if a tensor has an unexpected shape."""
        return COLUMNS.get(name) if rows_fit else None

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
        # Any value of a weight is valid, and reading them all takes time.
        if not name.endswith(("_scale", "input_zero_point")):
            return None
        if tensor.is_meta or tensor.numel() == 0:
            return None
        if name.endswith("_scale"):
            return _scale_fault(tensor, self.zero_is_none and name != "weight_scale")
        low, high = (float(value) for value in tensor.aminmax())
        if not (low >= -128 and high <= 127):
            return f"is {low:.0f}; expected -128 to 127"
        return None


@dataclass(frozen=True)
class FloatShape(QuantizedShape):
    """Expected tensors of a layer with floating-point weights in the checkpoint.

    Attributes:
        block: Number of rows and columns of the weight that share a scale; None for a
            per-tensor scale.
        scale_dtypes: Allowed dtypes of the blocks' scales.

    """

    block: tuple[int, int] | None = None
    scale_dtypes: tuple[torch.dtype, ...] = _FLOATS

    @classmethod
    def of(cls, scheme: dict[str, Any], k: int) -> Self:
        """Make the expected shape of a layer.

        Args:
            scheme: The layer's scheme from upstream's `get_scheme_dict`.
            k: Input features of the layer, before it is split among ranks.

        """
        weights = scheme["weights"]
        strategy = text(weights.strategy)
        block: tuple[int, int] | None = None
        scale_dtypes: tuple[torch.dtype, ...] = _FLOATS
        if strategy == "channel":
            block = 1, k
        elif strategy == "block":
            block = tuple(weights.block_structure)
        elif strategy != "tensor":
            block = 1, weights.group_size
            has_exponents = strategy == "group"
            scale_dtypes = E8M0_DTYPES if has_exponents else (torch.float8_e4m3fn,)
        return cls(k, weights.num_bits, 0, block=block, scale_dtypes=scale_dtypes)

    def fault(self, name: str, tensor: torch.Tensor, rows: int | None) -> Fault | None:
        if name in FLOAT_INPUT_KINDS:
            return None
        other = "weight" if self.bits < 8 else "weight_packed"
        if name == other:
            reason = f"is not expected for {self.bits}-bit weights"
            return Fault(reason, remedy_for("format"))
        return super().fault(name, tensor, rows)

    def _field(self, name: str, rows_fit: bool) -> str | None:
        is_scale = name == "weight_scale"
        return "weights.strategy or block_structure" if is_scale else None

    def _expected(
        self, name: str, rows: int | None
    ) -> tuple[tuple[torch.dtype, ...], tuple[int | None, ...]] | None:
        if name == "weight_packed":
            return (torch.uint8,), (rows, self.k // 2)
        if name == "weight":
            return (torch.float8_e4m3fn,), (rows, self.k)
        if name == "weight_scale" and self.block is not None:
            high, wide = self.block
            blocks = rows and math.ceil(rows / high)
            return self.scale_dtypes, (blocks, math.ceil(self.k / wide))
        return super()._expected(name, rows)

    def _value_fault(self, name: str, tensor: torch.Tensor) -> str | None:
        if name.endswith("_scale") and not tensor.is_meta:
            # FP8 may round the scale of a group to zero.
            zero = tensor.dtype == torch.float8_e4m3fn
            return _scale_fault(decoded_scale(tensor), zero)
        return None


def float_kinds(scheme: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of tensors that a floating-point weight is stored as."""
    weights = scheme["weights"]
    packed = weights.num_bits < 8
    has_global = text(weights.strategy) == "tensor_group"
    kinds = ["weight_packed" if packed else "weight", "weight_scale"]
    return (*kinds, "weight_global_scale") if has_global else tuple(kinds)


def remedy_for(field: str | None) -> str:
    """The remedy if a config field may be wrong, or if none can be (None)."""
    if field is None:
        return Remedy.EXPORT_AGAIN
    return Remedy.CORRECT_FIELD.format(field=field)


def _scale_fault(scale: torch.Tensor, zero: bool) -> str | None:
    """Why scales have invalid values, or None; `zero` allows the value 0."""
    if scale.numel() == 0:
        return None
    low, high = (float(value) for value in scale.aminmax())
    if (low > 0 or (zero and low == 0)) and high < math.inf:
        return None
    return f"has values from {low} to {high}; expected finite values above 0"


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
