# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Checks of a model against its checkpoint while vLLM builds and loads the model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (  # noqa: E501
    get_layer_partition_names,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_ascend_ct import compat
from vllm_ascend_ct.quantization.compressed_tensors import agreement
from vllm_ascend_ct.quantization.compressed_tensors.headers import (
    CheckpointHeaders,
    LayerFiles,
)
from vllm_ascend_ct.quantization.compressed_tensors.loading import LoadRecord
from vllm_ascend_ct.quantization.compressed_tensors.module_names import (
    renamed,
    renamed_prefixes,
)
from vllm_ascend_ct.quantization.compressed_tensors.tensors import QuantizedShape

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger("vllm.ascend_ct.quantization")


class Checkpoint:
    """The headers of a model's checkpoint, and the layers that vLLM builds from it.

    Headers are read when the first layer is built, in the process that builds it, and
    freed after loading: those of a large model take about 50 MB.
    """

    def __init__(self, config: CompressedTensorsConfig) -> None:
        """Start without a source; `set_source` follows.

        Args:
            config: Has `ignore` and `packed_modules_mapping`, which vLLM may change.

        """
        self._config = config
        self._source: tuple[str, str | None] | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._mappers: list[WeightsMapper] = []
        self._headers: CheckpointHeaders | None = None
        self._is_read = False
        # Whether another model was loaded with this config before.
        self.is_second = False
        self._is_checked = False
        # Whether some layer was resolved to 16 bits.
        self.is_resolved = False
        self._layers: WeakKeyDictionary[torch.nn.Module, tuple[str, Any]] = (
            WeakKeyDictionary()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config, "_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_over()

    def set_source(self, model: str, revision: str | None) -> None:
        """Set the model whose files to read.

        Args:
            model: Directory, or name on the Hugging Face Hub.
            revision: Revision on the Hub.

        """
        self._source = model, revision

    def add_mapper(self, mapper: "WeightsMapper") -> None:
        """Add a mapping from names in the files to names in vLLM."""
        self._mappers.append(mapper)
        if self._headers is not None:
            self._headers.map_names(self._mappers)

    @property
    def headers(self) -> CheckpointHeaders | None:
        """The headers; None if there are none or they cannot be read."""
        if not self._is_read:
            self._is_read = True
            self._headers = self._read()
        return self._headers

    def _read(self) -> CheckpointHeaders | None:
        if self._source is None or (self.is_second and not self._is_of_draft()):
            return None
        try:
            headers = CheckpointHeaders.read(*self._source)
        except Exception as error:
            # Go on: if a file is broken, vLLM's loader gives a better error.
            logger.warning_once(
                "Cannot read the safetensors headers of %s, so its layers are compared "
                "with its quantization_config only while they are loaded: %s",
                self._source[0],
                error,
            )
            return None
        headers.map_names(self._mappers)
        return headers

    def _is_of_draft(self) -> bool:
        """Whether the files may contain the draft model of speculative decoding.

        vLLM then builds the main model and the draft model with one quantization
        config.
        """
        vllm_config = get_current_vllm_config_or_none()
        speculative = getattr(vllm_config, "speculative_config", None)
        draft = getattr(speculative, "draft_model_config", None)
        return self._source is not None and (
            draft is None or draft.model == self._source[0]
        )

    def names_of(self, prefix: str) -> list[str]:
        """Names of a layer and of the shards that vLLM fuses into it.

        Args:
            prefix: The layer's prefix; in some models it begins with a dot.

        """
        name = prefix.lstrip(".")
        mapping = self._config.packed_modules_mapping
        return [name, *get_layer_partition_names(name, mapping)]

    def files(self, names: Sequence[str]) -> LayerFiles:
        """Find a layer in the files; the result is empty if headers are not known.

        Args:
            names: Names in vLLM of the layer and of its shards, in order.

        """
        headers = self.headers
        if headers is None:
            return LayerFiles(is_read=self._source is None)
        return headers.files(names)

    def check_layer(
        self, layer: torch.nn.Module, prefix: str, scheme: dict[str, Any] | None
    ) -> LayerFiles:
        """Record a layer that is being built, and compare its scheme with the files.

        Args:
            layer: The layer.
            prefix: Its name.
            scheme: Its scheme from upstream's `get_scheme_dict`; None if it is not
                quantized.

        Returns:
            The layer's tensors in the files.

        Raises:
            UnsupportedCheckpointError: A tensor in the files does not match the scheme.

        """
        files = self._note(layer, prefix, scheme, self.names_of(prefix))
        if (headers := self._checked_headers()) is not None:
            ignore = self._config.ignore
            agreement.check_layer(prefix, files.parts, scheme, ignore, headers)
        return files

    def check_experts(
        self,
        layer: Any,
        prefix: str,
        schemes: dict[str, dict[str, Any] | None],
    ) -> LayerFiles:
        """Record experts that are being built, and compare their scheme with the files.

        Args:
            layer: The MoE layer.
            prefix: Its name.
            schemes: Schemes from upstream's `get_scheme_dict`, by projection.

        Returns:
            The experts' tensors in the files.

        Raises:
            UnsupportedCheckpointError: The schemes differ, or a tensor in the files
                does not match them.

        """
        of_first = {f"{prefix}.0.{name}": given for name, given in schemes.items()}
        what, ignore = "Projections of one expert", self._config.ignore
        agreement.check_one_scheme(what, prefix, of_first, ignore, self.headers)
        scheme = next(iter(schemes.values()))
        experts = range(layer.global_num_experts)
        names = [f"{prefix}.{number}.{name}" for number in experts for name in schemes]
        files = self._note(layer, prefix, scheme, [prefix, *names])
        if (headers := self._checked_headers()) is not None:
            agreement.check_experts(prefix, files, scheme, ignore, headers)
        return files

    def _note(
        self,
        layer: torch.nn.Module,
        prefix: str,
        scheme: dict[str, Any] | None,
        names: Sequence[str],
    ) -> LayerFiles:
        self._layers[layer] = prefix, scheme
        self._is_checked = False
        return self.files(names)

    def _checked_headers(self) -> CheckpointHeaders | None:
        """The headers, if weights are loaded from the files (no dummy weights)."""
        return None if compat.load_format() == "dummy" else self.headers

    def record(self, layer: Any, prefix: str, shape: QuantizedShape) -> LoadRecord:
        """Create the record of the tensors that are loaded into a layer.

        Args:
            layer: The layer.
            prefix: Its name.
            shape: Its expected tensors in the checkpoint.

        """
        files = self.files(self.names_of(prefix))
        return LoadRecord(layer, prefix, shape, self.before_loading, files)

    def after_loading(self) -> None:
        """Free the headers: all layers are built and loaded."""
        if self._is_read:
            self._start_over()
            self.is_second = True

    def before_loading(self) -> None:
        """Check modules that are found in the files only by their names in the model.

        These are modules whose prefix differs from their name in the model, and modules
        that were built without the quantization config. Runs once, when the model is
        built.

        Raises:
            UnsupportedCheckpointError: A tensor in the files does not match its layer.

        """
        if self._is_checked or self._headers is None or not self._layers:
            return
        self._is_checked = True
        if (headers := self._checked_headers()) is None:
            return
        *_, last = self._layers
        modules = compat.modules_around(last)
        named = {
            path: self._layers[module][0].lstrip(".")
            for path, module in modules.items()
            if module in self._layers
        }
        prefixes = renamed_prefixes(named)
        for path, module in modules.items():
            name = renamed(path, prefixes)
            if path in named:
                self._check_renamed(module, named[path], name, headers)
            elif self._is_served_alone(module) and (layer := headers.find(name)):
                agreement.check_unquantized(path, layer)

    def _check_renamed(
        self,
        module: torch.nn.Module,
        built: str,
        name: str,
        headers: CheckpointHeaders,
    ) -> None:
        """Check a module whose prefix is not in the files by its name in the model.

        Args:
            module: The module.
            built: Its prefix.
            name: Its name in the model.
            headers: Headers of the whole checkpoint.

        """
        names = self.names_of(built)
        if headers.files(names).parts:
            return
        found = zip(names, map(headers.find, self.names_of(name)))
        parts = {name: layer for name, layer in found if layer is not None}
        scheme, ignore = self._layers[module][1], self._config.ignore
        agreement.check_layer(built, parts, scheme, ignore, headers)

    def _is_served_alone(self, module: torch.nn.Module) -> bool:
        """Whether a module has a weight of its own."""
        if not isinstance(module._parameters.get("weight"), torch.nn.Parameter):
            return False
        # A draft model may share the main model's embedding.
        return not (self.is_second and isinstance(module, VocabParallelEmbedding))
