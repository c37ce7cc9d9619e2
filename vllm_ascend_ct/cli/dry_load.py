# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Build a model and load its checkpoint without a single value.

vLLM builds the model on the meta device, and its own loader loads tensors that have the
shapes and dtypes of the files' headers. So the code that serves decides, and what reads
values (scales that are not finite, say) is all that it does not decide.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import (
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_ascend_ct.errors import UnsupportedCheckpointError, broken_checkpoint
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
)
from vllm_ascend_ct.quantization.compressed_tensors.headers import (
    INDEX,
    CheckpointHeaders,
)

# What safetensors calls the dtypes of tensors.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Which tensors are tables: not weights, which are empty or zeros of other dtypes.
_TABLES = {
    torch.full: (torch.int32, torch.int64),
    torch.arange: (torch.int32, torch.int64),
    torch.zeros: (torch.int64,),
}
# What vLLM's loaders read.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_LAYER = re.compile(r"layer ([^\s,]+)")


@dataclass
class Layer:
    """A linear layer, an embedding, an output head, or the experts of a block.

    Attributes:
        module: The layer.
        prefix: Its name in vLLM.
        scheme: As upstream's `get_scheme_dict` gives it; None if it is not quantized.
        refusal: Why it is not served, or None.
        example: Of the layers that are alike the one that was laid out.

    """

    module: Any
    prefix: str
    scheme: dict[str, Any] | None = None
    refusal: UnsupportedCheckpointError | None = None
    example: "Layer | None" = None

    @property
    def kind(self) -> str:
        """The name without the numbers of blocks."""
        return re.sub(r"\.\d+(?=\.|$)", ".*", self.prefix)


class DryConfig(AscendCTConfig):
    """The config that serves, which goes on after a refusal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers: dict[str, Layer] = {}

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str, *args: Any, **kwargs: Any
    ) -> QuantizeMethodBase | None:
        found = Layer(layer, prefix)
        if _stand_in(layer) is None:
            return super().get_quant_method(layer, prefix, *args, **kwargs)
        self.layers[prefix] = found
        try:
            found.scheme = self._scheme(layer, prefix)
            method = super().get_quant_method(layer, prefix, *args, **kwargs)
        except UnsupportedCheckpointError as error:
            found.refusal = error
            return _stand_in(layer)
        if method is not None:
            create = partial(_create_weights, found, method.create_weights)
            method.create_weights = create  # type: ignore[method-assign]
        return method

    def _scheme(self, layer: torch.nn.Module, prefix: str) -> dict[str, Any] | None:
        if isinstance(layer, RoutedExperts):
            self._add_fused_moe_to_target_scheme_map()
            prefix = f"{prefix}.0.{getattr(layer, 'ckpt_down_proj_name', 'down_proj')}"
        return self.get_scheme_dict(layer, prefix)


def _create_weights(
    found: Layer, create: Any, layer: Any, *args: Any, **kw: Any
) -> None:
    """Create a layer's weights, those of no quantization if it is refused."""
    try:
        create(layer, *args, **kw)
    except UnsupportedCheckpointError as error:
        found.refusal = error
        layer.quant_method = _stand_in(layer)
        layer.quant_method.create_weights(layer, *args, **kw)


def _stand_in(layer: Any) -> QuantizeMethodBase | None:
    """What a layer is built with that is refused; None if it has no weight."""
    if isinstance(layer, RoutedExperts):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if isinstance(layer, VocabParallelEmbedding):
        return UnquantizedEmbeddingMethod()
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class _TablesOnHost(TorchFunctionMode):
    """Keeps integers that layers look things up in where they can be read."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _TABLES.get(func, ()):
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


@dataclass
class DryLoad:
    """What became of a checkpoint.

    Attributes:
        model: Built on the meta device; None if vLLM did not build it.
        layers: In the order in which they were built.
        headers: Of the files, None if they cannot be read.
        errors: What concerns no layer that is known.

    """

    model: torch.nn.Module | None = None
    layers: list[Layer] = field(default_factory=list)
    headers: CheckpointHeaders | None = None
    errors: list[Exception] = field(default_factory=list)

    @property
    def is_served(self) -> bool:
        return not self.errors and not any(layer.refusal for layer in self.layers)


def dry_load(vllm_config: VllmConfig) -> DryLoad:
    """Build a model, load its checkpoint and lay it out, with shapes alone.

    Args:
        vllm_config: Of the engine that would serve it, with a `DryConfig`.

    """
    quant_config = vllm_config.quant_config
    assert isinstance(quant_config, DryConfig)
    result = DryLoad(errors=list(_broken_files(vllm_config.model_config.model)))
    dtype: Any = vllm_config.model_config.dtype
    result.headers = quant_config.checkpoint.headers
    if result.headers is None:
        # So nothing is missed that cannot be loaded.
        vllm_config.load_config.load_format = "dummy"
    with set_default_torch_dtype(dtype):
        try:
            with torch.device("meta"), _TablesOnHost():
                result.model = initialize_model(vllm_config)
        except Exception as error:
            result.errors.append(error)
        result.layers = list(quant_config.layers.values())
        if result.model is not None:
            _move_to_meta(result.model)
            if _load(result.model, quant_config, result):
                with torch.device("meta"):
                    _lay_out(result, quant_config)
    return result


def _move_to_meta(model: torch.nn.Module) -> None:
    """Move parameters to the meta device that a model allocates on another one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                moved = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
                moved.__dict__.update(parameter.__dict__)
                module._parameters[name] = moved


def _broken_files(model: str) -> Iterator[Exception]:
    """Refuse files of a folder whose headers do not fit them: one is cut off, say."""
    folder = Path(model)
    if not folder.is_dir():
        return
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        yield broken_checkpoint("The folder has no weights", model)
    paths = sorted(folder.glob("*.safetensors"))
    if (index := folder / INDEX).is_file():
        # vLLM reads no other.
        listed = json.loads(index.read_text())["weight_map"].values()
        paths = [folder / name for name in sorted(set(listed))]
    for path in paths:
        try:
            # For torch it would reserve memory for the whole file.
            with safe_open(path, "np"):
                pass
        except Exception as error:
            yield broken_checkpoint(f"The file cannot be read: {error}", str(path))


def _load(model: Any, quant_config: DryConfig, result: DryLoad) -> bool:
    """Load tensors, without those of layers that are refused, until all others are.

    Returns:
        Whether they are; another error stops vLLM's loader for good.

    """
    while result.headers is not None:
        skipped = _in_file(result.headers, quant_config, result.layers)
        try:
            model.load_weights(_tensors(result.headers, skipped))
            return True
        except UnsupportedCheckpointError as error:
            if not _refuse(result, quant_config, error):
                result.errors.append(error)
                return False
        except Exception as error:
            result.errors.append(error)
            return False
    return True


def _tensors(
    headers: CheckpointHeaders, skipped: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    # As vLLM takes them from a file.
    for name, layer in sorted(headers.layers.items()):
        if name in skipped:
            continue
        for kind, shape in sorted(layer.shapes.items()):
            dtype = _DTYPES[layer.dtypes[kind]]
            yield f"{name}.{kind}", torch.empty(shape, dtype=dtype, device="meta")


def _in_file(
    headers: CheckpointHeaders, quant_config: DryConfig, layers: list[Layer]
) -> set[str]:
    """Names that layers have in the file which are refused."""
    refused = {
        name
        for layer in layers
        if layer.refusal
        for name in quant_config.checkpoint.names_of(layer.prefix)
    }
    if not refused:
        return set()
    return {
        layer.name
        for name, layer in headers.by_name.items()
        if not refused.isdisjoint(_ancestors(name))
    }


def _ancestors(name: str) -> Iterator[str]:
    """A name, and those of the modules that have it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _refuse(
    result: DryLoad, quant_config: DryConfig, error: UnsupportedCheckpointError
) -> bool:
    """Note why layers are refused that are alike, if the error names one of them."""
    named = _LAYER.match(error.where)
    found = next((x for x in result.layers if named and x.prefix == named[1]), None)
    if found is None or found.refusal:
        return False
    tensors = _tensors_of(found, quant_config, result.headers)
    for layer in result.layers:
        if layer is found or (
            layer.kind == found.kind
            and layer.scheme == found.scheme
            and not layer.refusal
            and _tensors_of(layer, quant_config, result.headers) == tensors
        ):
            layer.refusal = error
    return True


def _tensors_of(
    layer: Layer, quant_config: DryConfig, headers: CheckpointHeaders | None
) -> list[tuple[str, dict[str, list[int]], dict[str, str]]]:
    """What the file has of a layer, by the last parts of the names."""
    if headers is None:
        return []
    names = quant_config.checkpoint.names_of(layer.prefix)
    if isinstance(layer.module, RoutedExperts):
        numbers = range(layer.module.global_num_experts)
        experts = {f"{layer.prefix}.{number}" for number in numbers}
        names = [n for n in headers.by_name if n.rpartition(".")[0] in experts]
    found = ((name, headers.find(name)) for name in names)
    return [
        (name.removeprefix(layer.prefix).rpartition(".")[2], x.shapes, x.dtypes)
        for name, x in found
        if x is not None
    ]


def _lay_out(result: DryLoad, quant_config: DryConfig) -> None:
    """Check that layers are complete, and lay out the first of those that are alike."""
    examples: list[tuple[Any, Layer]] = []
    for layer in result.layers:
        method = layer.module.quant_method
        if layer.refusal or not _is_ours(method):
            continue
        # Schemes have no hash.
        key = layer.kind, layer.scheme, type(layer.module), _parameters(layer.module)
        layer.example = next((x for other, x in examples if other == key), layer)
        try:
            if layer.example is layer or not hasattr(method, "check_loaded"):
                method.process_weights_after_loading(layer.module)
            else:
                method.check_loaded(layer.module)
        except UnsupportedCheckpointError as error:
            if not _refuse(result, quant_config, error):
                result.errors.append(error)
            continue
        except Exception as error:
            error.add_note(f"layer {layer.prefix}")
            result.errors.append(error)
            return
        if layer.example is layer:
            examples.append((key, layer))


def _is_ours(method: Any) -> bool:
    return any("vllm_ascend_ct" in base.__module__ for base in type(method).__mro__)


def _parameters(module: torch.nn.Module) -> tuple[tuple[str, torch.Size, str], ...]:
    return tuple(
        (name, parameter.shape, str(parameter.dtype))
        for name, parameter in module.named_parameters(recurse=False)
    )
