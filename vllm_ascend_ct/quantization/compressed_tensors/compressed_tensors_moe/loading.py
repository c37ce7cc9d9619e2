# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of experts' tensors while they are loaded.

vLLM's loader copies a tensor that is too small into a corner of its parameter, and does
not notice a missing expert.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from vllm.model_executor.layers.fused_moe import FusedMoEConfig

from vllm_ascend_ct.compat import load_format
from vllm_ascend_ct.errors import (
    PlatformError,
    Remedy,
    UnsupportedCheckpointError,
    broken_checkpoint,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import LayerFiles
from vllm_ascend_ct.quantization.compressed_tensors.load_formats import marked_scale
from vllm_ascend_ct.quantization.compressed_tensors.loading import (
    as_stored,
    missing_tensor,
    parameter_name,
    wrapped,
)
from vllm_ascend_ct.quantization.compressed_tensors.tensors import (
    OPTIONAL,
    Fault,
    FloatShape,
    QuantizedShape,
)

# The shards of each parameter. vLLM calls gate "w1", down "w2" and up "w3".
_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}
Transform = Callable[[str, torch.Tensor], torch.Tensor]


def expert_rows(moe: FusedMoEConfig) -> dict[str, int]:
    """Output features of one projection of an expert in the checkpoint.

    Returns:
        By prefix of the parameter, "w13" or "w2".

    """
    intermediate = moe.intermediate_size_per_partition * moe.tp_size
    return {"w13": intermediate, "w2": moe.hidden_dim}


def expert_columns(moe: FusedMoEConfig) -> dict[str, int]:
    """Input features of one projection of an expert in the checkpoint.

    Returns:
        By prefix of the parameter, "w13" or "w2".

    """
    rows = expert_rows(moe)
    # The outputs of one product are the inputs of the other.
    return {"w13": rows["w2"], "w2": rows["w13"]}


def expert_shapes(
    weights: QuantizationArgs, moe: FusedMoEConfig
) -> dict[str, QuantizedShape]:
    """Expected tensors of one expert in the checkpoint.

    Args:
        weights: How the weights are quantized.
        moe: The layer's config.

    Returns:
        By prefix of the parameter, "w13" or "w2".

    """
    if weights.type == QuantizationType.FLOAT:
        columns = expert_columns(moe).items()
        return {name: FloatShape.of({"weights": weights}, k) for name, k in columns}
    group_size = weights.group_size or 0
    return {
        name: QuantizedShape(
            k=k,
            bits=weights.num_bits,
            groups=k // group_size if group_size > 0 else 1,
        )
        for name, k in expert_columns(moe).items()
    }


class ExpertsLoadRecord:
    """Checks and records the tensors that the weight loader of experts is given."""

    def __init__(
        self,
        layer: Any,
        shapes: Mapping[str, QuantizedShape],
        before: Callable[[], None],
        files: LayerFiles,
        transform: Transform | None = None,
    ) -> None:
        """Start with an empty record.

        Args:
            layer: The MoE layer.
            shapes: Expected tensors of one expert, by prefix of their parameters.
            before: Called before each tensor is loaded.
            files: The experts' tensors in the files.
            transform: Converts a tensor, given its kind, before it is loaded.

        """
        self.layer = layer
        self.files = files
        self.loader: Callable[..., Any] | None = None
        self._shapes = shapes
        self._before = before
        self._transform = transform
        self.optional = OPTIONAL
        self._seen: dict[str, set[tuple[int, str]]] = {}
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
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> Any:
        self._before()
        name = parameter_name(self.layer, param)
        kind = name.partition("_")[2]
        if shard_id not in (*_SHARDS["w13"], *_SHARDS["w2"]):
            raise self._other_loader(f"{expert_id}, {weight_name}", shard_id)
        local = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local >= 0:
            fault = self._fault(kind, shard_id, loaded_weight)
            if fault is None and self._transform is not None:
                loaded_weight, fault = self._transformed(kind, loaded_weight)
            if fault is not None:
                raise self._refused(kind, shard_id, expert_id, fault)
            self._seen.setdefault(name, set()).add((local, shard_id))
        loaded_weight = as_stored(loaded_weight, param)
        try:
            return weight_loader(
                param,
                loaded_weight,
                weight_name,
                shard_id,
                expert_id,
                return_success=return_success,
            )
        except (PlatformError, torch.OutOfMemoryError):
            # Runtime errors that say nothing about the tensor.
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            reason = f"does not fit {list(param.shape)}: {error}"
            fault = Fault(reason, Remedy.EXPORT_AGAIN)
            raise self._refused(kind, shard_id, expert_id, fault) from error

    def check_complete(self) -> None:
        """Refuse a layer with missing tensors, and clear the record.

        Raises:
            UnsupportedCheckpointError: A tensor was not loaded; the error names it.

        """
        seen, self._seen = self._seen, {}
        if not seen and marked_scale(self.layer) is None:
            # The load format fills parameters without their weight loaders.
            return
        experts = range(self.layer.local_num_experts)
        for name, param in self.layer.named_parameters(recurse=False):
            prefix, _, kind = name.partition("_")
            is_other = getattr(param, "weight_loader", 0) != self.loader
            if kind in self.optional or is_other:
                continue
            given = seen.get(name, set())
            for shard in _SHARDS[prefix]:
                missing = [e for e in experts if (e, shard) not in given]
                if missing:
                    raise self._missing(kind, shard, missing[0])
        if not seen:
            raise self._missing("weight_scale", "w1", 0)

    def _fault(self, kind: str, shard: str, tensor: torch.Tensor) -> Fault | None:
        prefix = "w2" if shard == "w2" else "w13"
        rows = expert_rows(self.layer.moe_config)[prefix]
        return self._shapes[prefix].fault(kind, tensor, rows)

    def _transformed(
        self, kind: str, tensor: torch.Tensor
    ) -> tuple[torch.Tensor, Fault | None]:
        assert self._transform is not None
        try:
            return self._transform(kind, tensor), None
        except ValueError as error:
            return tensor, Fault(str(error), Remedy.CALIBRATE_AGAIN)

    def _projection(self, shard: str) -> str:
        layer = self.layer
        names = {
            "w1": getattr(layer, "ckpt_gate_proj_name", "gate_proj"),
            "w2": getattr(layer, "ckpt_down_proj_name", "down_proj"),
            "w3": getattr(layer, "ckpt_up_proj_name", "up_proj"),
        }
        return str(names.get(shard, shard))

    def _missing(self, kind: str, shard: str, local: int) -> UnsupportedCheckpointError:
        """Make the error for a tensor that was not loaded.

        Args:
            kind: Kind of the tensor.
            shard: "w1", "w2" or "w3".
            local: Number of the expert on this rank.

        """
        layer = self.layer
        number = next(
            expert
            for expert in range(layer.global_num_experts)
            if layer._map_global_expert_id_to_local_expert_id(expert) == local
        )
        part = f"{number}.{self._projection(shard)}"
        known, alike = (
            [found for found in layers if found.name.endswith(f".{part}")]
            for layers in (self.files.parts.values(), self.files.alike)
        )
        return missing_tensor(layer.layer_name, f"{part}.{kind}", known, alike)

    def _other_loader(self, tensor: str, shard: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(
            f"vLLM's loader for this model splits experts in an unknown way ({shard})",
            where=f"layer {self.layer.layer_name}, expert {tensor}",
            supported="models whose loaders load the gate, up and down projections of "
            "quantized experts",
            remedy=Remedy.OTHER_LOADER,
        )

    def _refused(
        self, kind: str, shard: str, expert: int, fault: Fault
    ) -> UnsupportedCheckpointError:
        tensor = f"{expert}.{self._projection(shard)}.{kind}"
        return broken_checkpoint(
            f"The checkpoint's {tensor} {fault.reason}",
            f"layer {self.layer.layer_name}, tensor {tensor}",
            fault.remedy,
        )
