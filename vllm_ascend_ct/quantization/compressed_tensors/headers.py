# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The layers in a checkpoint's files, by their names in vLLM.

Only the headers of the safetensors files are read. A layer is not found if the model's
code renames it other than by its class's `WeightsMapper`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.transformers_utils.config import get_safetensors_params_metadata

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

_QUANTIZED = {"weight_packed", "weight_scale"}
_FLOATS = ("F16", "BF16", "F32", "F64")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class FileLayer:
    """The tensors of one layer in the files.

    Attributes:
        name: Name of the layer in the files.
        shapes: Shapes by kind of tensor, for example `weight_scale`.
        dtypes: Names of dtypes in safetensors, by kind of tensor.

    """

    name: str
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]

    @property
    def is_quantized(self) -> bool:
        return not _QUANTIZED.isdisjoint(self.shapes)

    @property
    def is_plain(self) -> bool:
        return self.dtypes.get("weight") in _FLOATS and not self.is_quantized

    def is_like(self, other: "FileLayer") -> bool:
        """Whether neither layer is quantized, or both are in the same format."""
        if not self.is_quantized:
            return not other.is_quantized
        return self._kinds == other._kinds

    @property
    def _kinds(self) -> dict[str, str]:
        return {k: d for k, d in self.dtypes.items() if k != "bias"}

    @property
    def fused_experts(self) -> str | None:
        """Kind of an unquantized tensor that holds all experts, or None."""
        for kind, dtype in self.dtypes.items():
            if len(self.shapes[kind]) == 3 and dtype in _FLOATS:
                return kind
        return None

    @property
    def quantized_tensor(self) -> str:
        """Name of a tensor that shows that the layer is quantized."""
        return f"{self.name}.{min(_QUANTIZED & self.shapes.keys())}"


@dataclass(frozen=True)
class LayerFiles:
    """The tensors in the files of one of vLLM's layers.

    Attributes:
        parts: The layer and its shards, by their names in vLLM, as far as found.
        shards: Names of the shards, in order.
        alike: If no part is found, layers of the same block with similar names.
        biased: Names in the files of the parts that have a bias in some block.
        is_read: Whether the headers were read.

    """

    parts: dict[str, FileLayer] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    alike: tuple[FileLayer, ...] = ()
    biased: frozenset[str] = frozenset()
    is_read: bool = False

    def of_shard(self, number: int | None) -> list[FileLayer]:
        """The parts of one shard, by its index; all parts for None."""
        if number is None or number >= len(self.shards):
            return list(self.parts.values())
        found = self.parts.get(self.shards[number])
        return [] if found is None else [found]


class CheckpointHeaders:
    """The layers in a checkpoint's files.

    Attributes:
        layers: Layers by name in the files.
        by_name: Layers by name in vLLM, and by name in the files.

    """

    def __init__(self, headers: Mapping[str, dict[str, Any]]) -> None:
        """Group tensors by layer.

        Args:
            headers: `shape` and `dtype` of each tensor, by its name.

        """
        self.layers: dict[str, FileLayer] = {}
        for name, header in headers.items():
            layer, _, kind = name.rpartition(".")
            if not layer:
                continue
            found = self.layers.get(layer) or FileLayer(layer, {}, {})
            found.shapes[kind] = header["shape"]
            found.dtypes[kind] = header["dtype"]
            self.layers[layer] = found
        self.by_name = self.layers

    @classmethod
    def read(cls, model: str, revision: str | None) -> "CheckpointHeaders":
        """Read the headers of a model's safetensors files.

        Args:
            model: Directory, or name on the Hugging Face Hub.
            revision: Revision on the Hub.

        Raises:
            ValueError: The model has no safetensors files.

        """
        headers = get_safetensors_params_metadata(model, revision=revision)
        index = Path(model) / INDEX
        if index.exists():
            # vLLM loads only files that the index lists.
            listed = json.loads(index.read_text())["weight_map"]
            headers = {name: headers[name] for name in headers.keys() & listed.keys()}
        if not headers:
            raise ValueError("there are no safetensors files")
        return cls(headers)

    def map_names(self, mappers: Sequence["WeightsMapper"]) -> None:
        """Fill `by_name` from the mappings of weight names that vLLM applies.

        A model that contains other models has a mapping for each. vLLM may apply them
        in sequence or each alone, so both are tried.
        """
        names = dict.fromkeys(self.layers)
        self.by_name = dict(self.layers)
        chain: dict[str, str] = {name: name for name in names}
        for number, mapper in enumerate(mappers):
            if number:
                self._add(_mapped({name: name for name in names}, mapper))
            chain = _mapped(chain, mapper)
            self._add(chain)

    def _add(self, names: Mapping[str, str]) -> None:
        self.by_name |= {mapped: self.layers[name] for name, mapped in names.items()}

    def find(self, name: str) -> FileLayer | None:
        """The layer with this name in vLLM; None if it is not found."""
        return self.by_name.get(name)

    def files(self, names: Sequence[str]) -> LayerFiles:
        """Find a layer and its shards.

        Args:
            names: Names in vLLM of the layer and of its shards, in order.

        """
        found = {name: self.find(name) for name in names}
        parts = {name: layer for name, layer in found.items() if layer is not None}
        alike: list[FileLayer] = []
        if not parts:
            for name in names:
                alike += self._alike.get(_essence(name), ())
        biased = {
            layer.name
            for layer in parts.values()
            if _without_numbers(layer.name) in self._biased
        }
        shards = tuple(names[1:])
        return LayerFiles(parts, shards, tuple(alike), frozenset(biased), True)

    @cached_property
    def _alike(self) -> dict[tuple[str, ...], list[FileLayer]]:
        found = defaultdict(list)
        for layer in self.layers.values():
            found[_essence(layer.name)].append(layer)
        return found

    def has_quantized(self, name: str) -> bool:
        """Whether some layer is quantized whose name has the same last part."""
        last = name.rpartition(".")[2]
        return any(
            layer.is_quantized and layer.name.rpartition(".")[2] == last
            for layer in self.layers.values()
        )

    @cached_property
    def _biased(self) -> set[str]:
        return {
            _without_numbers(layer.name)
            for layer in self.layers.values()
            if "bias" in layer.shapes
        }

    def matching(self, pattern: str) -> Iterator[FileLayer]:
        """Yield the layers that a regular expression matches, as vLLM matches it."""
        compiled = re.compile(pattern)
        for name, layer in self.by_name.items():
            if compiled.match(name):
                yield layer


def _mapped(names: Mapping[str, str], mapper: "WeightsMapper") -> dict[str, str]:
    mapped = {}
    for name, current in names.items():
        # Some mappings match whole names of weights.
        for new in mapper.apply_list([f"{current}.weight"]):
            mapped[name] = new.rpartition(".")[0]
    return mapped


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _essence(name: str) -> tuple[str, ...]:
    """The numeric parts of a name, and its last part."""
    *path, last = name.split(".")
    return *(part for part in path if part.isdigit()), last
