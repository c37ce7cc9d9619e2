# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Floating-point weights that the chip does not multiply, resolved to 16 bits.

A layer is an unquantized one whose loader takes the checkpoint's tensors, and gives the
layer's own loader the weight that they are made of as soon as it has all of them. So
nothing is held twice but the tensor being loaded, all rows of it on each rank, and what
waits for its scale. vLLM splits 16-bit weights over ranks: a block of scales may be
split as well.
"""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self

import torch
from vllm.model_executor.utils import set_weight_attrs

from vllm_ascend_ct.errors import Remedy, broken_checkpoint
from vllm_ascend_ct.ops.limits import current_limits
from vllm_ascend_ct.quantization.compressed_tensors import agreement, load_formats
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors_moe.loading import (  # noqa: E501
    ExpertsLoadRecord,
    expert_columns,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.loading import (
    LoadRecord,
    parameter_name,
)
from vllm_ascend_ct.quantization.compressed_tensors.refusals import tied_otherwise
from vllm_ascend_ct.quantization.compressed_tensors.tensors import (
    FLOAT_INPUT_KINDS,
    OPTIONAL,
    FloatShape,
    float_kinds,
)
from vllm_ascend_ct.quantization.compressed_tensors.unquantized import WatchedMixin
from vllm_ascend_ct.weights.float_quantized import dequantize

_WEIGHT = "weight"


class ResolvedMixin(WatchedMixin):
    """First base of an unquantized method of vLLM's or vllm-ascend's."""

    scheme: dict[str, Any]
    record: LoadRecord | ExpertsLoadRecord
    # What the names of a layer's parameters begin with.
    prefixes: tuple[str, ...] = ("",)

    def resolve(self, scheme: dict[str, Any]) -> Self:
        """Say what the checkpoint's tensors are.

        Args:
            scheme: As upstream's `get_scheme_dict` gives it.

        """
        self.scheme = scheme
        self._kinds = float_kinds(scheme)
        self._pieces: dict[Hashable, dict[str, torch.Tensor]] = {}
        self._saving: Any = None
        return self

    def _shape(self, k: int) -> FloatShape:
        return FloatShape.of(self.scheme, k)

    def _places(self) -> Iterator[tuple[str, str]]:
        for prefix in self.prefixes:
            for kind in (*self._kinds, *FLOAT_INPUT_KINDS):
                if kind != _WEIGHT:
                    yield prefix, kind

    def _add_places(self, layer: Any) -> None:
        """Register what vLLM's loaders look up by the names of the file's tensors."""
        for prefix, kind in self._places():
            # A reload takes the layer to be loaded in part if one of them came last: it
            # counts what is copied, up to a parameter's size. So none is empty, and the
            # layer is processed when all of the model is loaded.
            empty = torch.zeros(1, dtype=torch.uint8)
            place = torch.nn.Parameter(empty, requires_grad=False)
            set_weight_attrs(place, {"weight_loader": self.record.loader})
            layer.register_parameter(prefix + kind, place)
        optional = (_WEIGHT,) if _WEIGHT not in self._kinds else ()
        self.record.optional = (*OPTIONAL, *FLOAT_INPUT_KINDS, *optional)

    def _checking(self, weight_loader: Callable[..., Any]) -> Callable[..., Any]:
        return self.record.record(self._resolving(self.record.layer, weight_loader))

    def _resolving(
        self, layer: Any, weight_loader: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Wrap a layer's loader so that it gets weights of 16 bits."""

        @functools.wraps(weight_loader)
        def load(
            param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            name = parameter_name(layer, param)
            kind = self._kind(name)
            if kind in FLOAT_INPUT_KINDS:
                return True
            if kind not in self._kinds or not self._is_local(layer, args):
                return weight_loader(param, loaded_weight, *args, **kwargs)
            weight_name = name.removesuffix(kind) + _WEIGHT
            weight = getattr(layer, weight_name)
            if weight.is_meta:
                # vLLM counts what a reload copies: of each tensor something.
                weight.new_empty(1).copy_(weight.new_empty(1))
                return True
            shard, args = self._of_shard(weight_name, args, kwargs)
            pieces = self._pieces.setdefault((weight_name, shard), {})
            pieces[kind] = loaded_weight
            if len(pieces) < len(self._kinds):
                # Some iterators over files use their buffers again.
                pieces[kind] = loaded_weight.clone()
                return True
            del self._pieces[weight_name, shard]
            dense = self._dequantized(pieces, weight)
            return weight_loader(weight, dense, *args, **kwargs)

        return load

    def _kind(self, name: str) -> str:
        return name

    def _is_local(self, layer: Any, args: tuple[Any, ...]) -> bool:
        """Whether this rank has what is loaded."""
        return True

    def _of_shard(
        self, weight_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Hashable, tuple[Any, ...]]:
        """What identifies a shard, and a loader's arguments for its weight."""
        return next(iter((*args, *kwargs.values())), None), args

    def _dequantized(
        self, pieces: dict[str, torch.Tensor], weight: torch.Tensor
    ) -> torch.Tensor:
        stored, scale = (pieces[kind] for kind in self._kinds[:2])
        n = len(stored)
        k = stored.shape[1] * (8 // self.scheme["weights"].num_bits)
        dense = dequantize(
            stored,
            scale,
            self._shape(k).block or (n, k),
            pieces.get("weight_global_scale"),
            weight.dtype,
            weight.device,
        )
        if not all(value.isfinite() for value in dense.aminmax()):
            dtypes = current_limits().weight_quant_batchmatmul.x_dtypes
            raise broken_checkpoint(
                f"Values of a weight are not finite in {weight.dtype}",
                f"layer {self.layer_name}, tensor {self._kinds[0]}",
                Remedy.OTHER_DTYPE
                if torch.bfloat16 in dtypes
                else Remedy.CALIBRATE_AGAIN,
            )
        return dense

    def process_weights_after_loading(self, layer: Any) -> None:
        pieces, self._pieces = self._pieces, {}
        if not self.record.is_dummy:
            self.record.check_complete()
            self._check_pieces(pieces)
            if getattr(layer, "bias", None) is not None:
                agreement.check_bias(self.record.files)
        self.record.files = LayerFiles()
        for prefix, kind in self._places():
            layer._parameters.pop(prefix + kind, None)
        self._saving = self._saving or load_formats.refuse_saving(layer)
        super().process_weights_after_loading(layer)

    def _check_pieces(self, pieces: dict[Hashable, dict[str, torch.Tensor]]) -> None:
        """Refuse a weight of which some tensors did not come, in a reload."""
        for found in pieces.values():
            missing = next(kind for kind in self._kinds if kind not in found)
            raise broken_checkpoint(
                "A tensor of the layer is missing",
                f"layer {self.layer_name}, tensor {missing}",
            )

    def _in_file(self, name: str) -> str:
        return name.removesuffix(_WEIGHT) + self._kinds[0]


class ResolvedLinearMixin(ResolvedMixin):
    """For a linear layer, an embedding or an output head."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        load_formats.check_load_format(self.layer_name)
        shape = self._shape(input_size)
        self.record = self.checkpoint.record(layer, self.layer_name, shape)
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **attributes,
        )
        self._add_places(layer)


class ResolvedHeadMixin(ResolvedLinearMixin):
    """For an output head."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> torch.nn.Module:
        method = getattr(embed_tokens, "quant_method", None)
        if not isinstance(method, ResolvedMixin) or method.scheme != self.scheme:
            raise tied_otherwise(self.layer_name)
        tied: torch.nn.Module = super().tie_weights(layer, embed_tokens)
        return tied


class ResolvedExpertsMixin(ResolvedMixin):
    """For routed experts."""

    record: ExpertsLoadRecord
    prefixes = ("w13_", "w2_")
    moe: Any

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        load_formats.check_load_format(self.layer_name)
        self.record = ExpertsLoadRecord(
            layer,
            {name: self._shape(k) for name, k in expert_columns(self.moe).items()},
            self.checkpoint.before_loading,
            self.files,
        )
        super().create_weights(layer, *args, **attributes)
        self._add_places(layer)

    def _kind(self, name: str) -> str:
        return name.partition("_")[2]

    def _is_local(self, layer: Any, args: tuple[Any, ...]) -> bool:
        local: int = layer._map_global_expert_id_to_local_expert_id(args[2])
        return local >= 0

    def _of_shard(
        self, weight_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Hashable, tuple[Any, ...]]:
        _, shard, expert = args
        return (shard, expert), (weight_name, shard, expert)
