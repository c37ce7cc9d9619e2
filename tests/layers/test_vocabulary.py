# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Quantized embeddings and output heads, with upstream's layers and loaders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from tests import lacks
from tests.formula import relative_error
from tests.layers.quantized_layers import (
    TOLERANCES,
    activations,
    config_of,
    load_embedding,
    load_head,
)
from vllm_ascend_ct import compat
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.quantization.compressed_tensors.vocab_parallel_embedding import (
    AscendCTEmbeddingMethod,
    AscendCTHeadMethod,
    AscendCTUnquantizedHeadMethod,
)

BF16 = torch.bfloat16
# Not a multiple of 64, so vLLM pads it.
VOCABULARY = 1008

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scheme",
    ["w2a16-g64-asym", "w3a16-channel", "w4a16-g32", "w4a16-channel-asym"]
    + ["w6a16-g64-asym", "w8a16-g128", "w8a16-channel-asym"],
)
def test_embedding_is_the_formula(scheme: str, dtype: torch.dtype) -> None:
    layer, formula = load_embedding(VOCABULARY, 256, scheme, dtype)
    assert type(layer.quant_method) is AscendCTEmbeddingMethod
    ids = torch.tensor([[0, 1, 5], [VOCABULARY - 1, 5, 77]])
    # One rounding of the exact product.
    assert torch.equal(layer(ids), formula.weight[ids].float().to(dtype))


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32-asym", "w3a16-g64", "w8a8-channel-dynamic", "w4a8-channel"]
)
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 66000])
def test_head_is_the_formula(scheme: str, vocabulary: int) -> None:
    """Also with more outputs than the operator supports."""
    layer, formula = load_head(vocabulary, 256, scheme, BF16)
    assert type(layer.quant_method) is AscendCTHeadMethod
    x = formula.without_ties(activations(7, 256, BF16))
    y = layer.quant_method.apply(layer, x)[:, :vocabulary]
    if scheme == "w4a8-channel" and vocabulary > 65535:
        formula.input_args = None
    assert relative_error(y, formula(x)) < TOLERANCES[BF16]


def new_head(config: Any = None, size: int = 64) -> Any:
    return ParallelLMHead(
        size, 256, params_dtype=BF16, quant_config=config, prefix="lm_head"
    )


def method_of_head(config: Any, prefix: str = "lm_head") -> type:
    layer = ParallelLMHead(
        64, 256, params_dtype=BF16, quant_config=config, prefix=prefix
    )
    return type(layer.quant_method)


@pytest.mark.parametrize(
    "prefix",
    ["lm_head", "language_model.lm_head", "draft_model.lm_head", "layers.9.head"],
)
def test_class_target_means_a_head_that_the_checkpoint_has(
    tmp_path: Path, prefix: str
) -> None:
    """In the checkpoint it is a Linear; in vLLM it is not a LinearBase."""
    ignore = ["lm_head"]
    config = config_of("Linear", "w4a16-g32", ignore=ignore)
    assert method_of_head(config, prefix) is AscendCTUnquantizedHeadMethod
    for quantized in (False, True):
        tensors = {"lm_head.weight": torch.zeros(64, 256)}
        if quantized:
            packed = torch.zeros(64, 32, dtype=torch.int32)
            tensors = {"lm_head.weight_packed": packed}
        save_file(tensors, tmp_path / "model.safetensors")
        config = config_of("Linear", "w4a16-g32")
        config.maybe_update_config(str(tmp_path))
        expected = quantized and prefix.endswith("lm_head")
        assert (method_of_head(config, prefix) is AscendCTHeadMethod) is expected


def test_named_target_means_the_head() -> None:
    assert method_of_head(config_of("lm_head", "w4a16-g32")) is AscendCTHeadMethod


@pytest.mark.parametrize("target", ["re:none", "re:.*"], ids=["dense", "quantized"])
def test_head_tied_to_a_quantized_embedding(target: str) -> None:
    tied = []

    def tie(embedding: Any) -> None:
        head = ParallelLMHead(
            VOCABULARY, 256, quant_config=config_of(target, "w4a16-g32")
        )
        tied.append(head.tie_weights(embedding))

    embedding, formula = load_embedding(VOCABULARY, 256, "w4a16-g32", BF16, built=tie)
    (head,) = tied
    assert (head is embedding) is compat.METHODS_TIE_WEIGHTS
    if head is not embedding:
        head.quant_method.process_weights_after_loading(head)
        # It has no weight of its own, which would be unused.
        assert [p.numel() for p in head.parameters()] == [0]
    x = activations(7, 256, BF16)
    y = head.quant_method.apply(head, x)[:, :VOCABULARY]
    assert relative_error(y, formula(x)) < TOLERANCES[BF16]


def test_head_tied_to_an_embedding_that_is_not_quantized() -> None:
    embedding = new_head()
    assert type(embedding.quant_method) is UnquantizedEmbeddingMethod
    layer = new_head(config_of("re:none", "w4a16-g32"))
    assert layer.tie_weights(embedding) is layer
    assert layer.weight is embedding.weight
    layer = new_head(config_of("lm_head", "w4a16-g32"))
    tied = "tied .*layer lm_head"
    reason = tied if compat.METHODS_TIE_WEIGHTS else "weight_packed is missing"
    with pytest.raises(UnsupportedCheckpointError, match=reason):
        layer.tie_weights(embedding)
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("scheme", ["w8a8-channel-dynamic", "w4a8-channel-packed"])
def test_embedding_with_quantized_activations_is_refused(scheme: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="of an embedding; supp"):
        load_embedding(VOCABULARY, 256, scheme, BF16)


@pytest.mark.skipif(lacks.is_older(), reason="refused for its width first")
def test_vocabulary_whose_zero_points_end_within_a_word_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="N=.1000. of shards"):
        load_embedding(1000, 256, "w2a16-g64-asym", BF16)
