# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What a tensor of a quantized layer looks like in a checkpoint."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.quantization.compressed_tensors.utils import text
from vllm_ascend_ct.weights.float_quantized import E8M0_DTYPES, decoded_scale

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The field of the config that says whether there is a tensor of each kind. None for
# an order of activations, which nothing here can follow.
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
# Those that its columns follow from.
COLUMNS = {
    "weight_packed": "weights.num_bits",
    "weight_scale": "weights.strategy or group_size",
    "weight_zero_point": "weights.strategy, group_size or num_bits",
    "input_scale": "input_activations.strategy",
    "input_zero_point": "input_activations.strategy",
}
# Upstream registers it and reads it nowhere; not all who write checkpoints write it.
OPTIONAL = ("weight_shape",)
# Beside floating-point weights: inputs stay in 16 bits, so nobody reads them, and those
# of experts that no token came to while the model was calibrated may be anything.
FLOAT_INPUT_KINDS = ("input_scale", "input_global_scale")


class Fault(NamedTuple):
    """What is wrong with a tensor, and what to do about it."""

    reason: str
    remedy: str


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

    def fault(self, name: str, tensor: torch.Tensor, rows: int | None) -> Fault | None:
        """Why a tensor cannot be right, or None.

        Args:
            name: Of the parameter.
            tensor: As it is in the checkpoint.
            rows: Output features of the layer or of the shard, of all ranks; None if
                not known.

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
        """The field of the config that a tensor's shape may be right for otherwise."""
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
        # Weights have no value that is wrong, and reading them all takes time.
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
    """What the checkpoint's tensors of a floating-point layer have to look like.

    Attributes:
        block: Rows and columns of the weight that share a scale; None if all do.
        scale_dtypes: Of the scales of blocks.

    """

    block: tuple[int, int] | None = None
    scale_dtypes: tuple[torch.dtype, ...] = _FLOATS

    @classmethod
    def of(cls, scheme: dict[str, Any], k: int) -> Self:
        """The tensors of a layer.

        Args:
            scheme: As upstream's `get_scheme_dict` gives it.
            k: Input features, of all ranks.

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
            reason = f"is there, of weights of {self.bits} bits"
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
            # A group of zeros may have a scale that FP8 rounds to zero.
            zero = tensor.dtype == torch.float8_e4m3fn
            return _scale_fault(decoded_scale(tensor), zero)
        return None


def float_kinds(scheme: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of tensors that a floating-point weight is made of."""
    weights = scheme["weights"]
    packed = weights.num_bits < 8
    has_global = text(weights.strategy) == "tensor_group"
    kinds = ["weight_packed" if packed else "weight", "weight_scale"]
    return (*kinds, "weight_global_scale") if has_global else tuple(kinds)


def remedy_for(field: str | None) -> str:
    """What to do where a field of the config may be wrong, or none can be."""
    if field is None:
        return Remedy.EXPORT_AGAIN
    return Remedy.CORRECT_FIELD.format(field=field)


def _scale_fault(scale: torch.Tensor, zero: bool) -> str | None:
    """Why scales cannot be right, or None; `zero` says whether 0 can."""
    if scale.numel() == 0:
        return None
    low, high = (float(value) for value in scale.aminmax())
    if (low > 0 or (zero and low == 0)) and high < math.inf:
        return None
    return f"has values from {low} to {high}; expected finite and above 0"


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
