# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Resolving of floating-point weights that the chip cannot multiply to 16 bits.

The layer is an unquantized one. Its weight loader collects the checkpoint's tensors of
a weight, dequantizes them as soon as it has all, and passes the 16-bit weight to the
layer's own loader. Besides the loaded layers, memory holds only the tensor that is
being loaded (all its rows, on each rank) and tensors that wait for their scale. vLLM
shards the 16-bit weight over ranks, so a shard may begin within a block that shares a
scale.
"""

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
    wrapped,
)
from vllm_ascend_ct.quantization.compressed_tensors.refusals import (
    enough_memory,
    tied_otherwise,
)
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
    """Mixin before an unquantized method of vLLM or vllm-ascend, which resolves."""

    scheme: dict[str, Any]
    record: LoadRecord | ExpertsLoadRecord
    # Prefixes of the names of the layer's parameters.
    prefixes: tuple[str, ...] = ("",)

    def resolve(self, scheme: dict[str, Any]) -> Self:
        """Set the scheme of the checkpoint's tensors.

        Args:
            scheme: The layer's scheme from upstream's `get_scheme_dict`.

        Returns:
            This method.

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
        """Register placeholder parameters for the tensors that loaders look up by name.

        Loaders find a layer's parameters by the names of the tensors in the files.
        """
        for prefix, kind in self._places():
            # A reload counts the elements that are copied for each tensor, at most the
            # size of its parameter. A placeholder has one element so that its tensor
            # counts too; the layer is processed once the whole model is loaded.
            empty = torch.zeros(1, dtype=torch.uint8)
            place = torch.nn.Parameter(empty, requires_grad=False)
            set_weight_attrs(place, {"weight_loader": self.record.loader})
            layer.register_parameter(prefix + kind, place)
        optional = (_WEIGHT,) if _WEIGHT not in self._kinds else ()
        self.record.optional = (*OPTIONAL, *FLOAT_INPUT_KINDS, *optional)

    def _checking(self, weight_loader: Callable[..., Any]) -> Callable[..., Any]:
        return self.record.record(wrapped(weight_loader, self._load))

    def _load(
        self,
        weight_loader: Callable[..., Any],
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call a layer's weight loader with 16-bit weights only."""
        layer = self.record.layer
        name = parameter_name(layer, param)
        kind = self._kind(name)
        if kind in FLOAT_INPUT_KINDS:
            return True
        if kind not in self._kinds or not self._is_local(layer, args):
            return weight_loader(param, loaded_weight, *args, **kwargs)
        weight_name = name.removesuffix(kind) + _WEIGHT
        weight = getattr(layer, weight_name)
        if weight.is_meta:
            # In a reload vLLM counts copied elements: copy one for each tensor.
            weight.new_empty(1).copy_(weight.new_empty(1))
            return True
        shard, args = self._of_shard(weight_name, args, kwargs)
        pieces = self._pieces.setdefault((weight_name, shard), {})
        pieces[kind] = loaded_weight
        if len(pieces) < len(self._kinds):
            # Some weight iterators reuse their buffers, so keep a copy.
            pieces[kind] = loaded_weight.clone()
            return True
        del self._pieces[weight_name, shard]
        dense = self._dequantized(pieces, weight)
        return weight_loader(weight, dense, *args, **kwargs)

    def _kind(self, name: str) -> str:
        return name

    def _is_local(self, layer: Any, args: tuple[Any, ...]) -> bool:
        """Whether the tensor belongs to this rank."""
        return True

    def _of_shard(
        self, weight_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Hashable, tuple[Any, ...]]:
        """Key of the shard, and the loader's arguments for the shard's weight.

        Args:
            weight_name: Name of the layer's weight.
            args: Positional arguments of the loader of the checkpoint's tensor.
            kwargs: Its keyword arguments.

        """
        return next(iter((*args, *kwargs.values())), None), args

    def _dequantized(
        self, pieces: dict[str, torch.Tensor], weight: torch.Tensor
    ) -> torch.Tensor:
        stored, scale = (pieces[kind] for kind in self._kinds[:2])
        n = len(stored)
        k = stored.shape[1] * (8 // self.scheme["weights"].num_bits)
        with enough_memory(self.layer_name):
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
                f"A weight has values that are not finite in {weight.dtype}",
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
        """Refuse a weight if a reload did not load all of its tensors."""
        for found in pieces.values():
            missing = next(kind for kind in self._kinds if kind not in found)
            raise broken_checkpoint(
                "A tensor of the layer is missing",
                f"layer {self.layer_name}, tensor {missing}",
            )

    def _in_file(self, name: str) -> str:
        return name.removesuffix(_WEIGHT) + self._kinds[0]


class ResolvedLinearMixin(ResolvedMixin):
    """Resolves the weight of a linear layer, an embedding or an output head."""

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
    """Resolves the weight of an output head, which may be tied to an embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> torch.nn.Module:
        method = getattr(embed_tokens, "quant_method", None)
        if not isinstance(method, ResolvedMixin) or method.scheme != self.scheme:
            raise tied_otherwise(self.layer_name)
        tied: torch.nn.Module = super().tie_weights(layer, embed_tokens)
        return tied


class ResolvedExpertsMixin(ResolvedMixin):
    """Resolves the weights of routed experts."""

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
