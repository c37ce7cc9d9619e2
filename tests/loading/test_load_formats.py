# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Weights that do not come from the checkpoint's own safetensors files."""

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.modernbert import ModernBertModel
from vllm.platforms import current_platform

from tests import lacks
from tests.layers import quantized_experts
from tests.layers.quantized_layers import activations, config_of, row_case
from tests.loading import models
from tools.checkpoints.make_checkpoint import SCHEMES
from vllm_ascend_ct.errors import Remedy, UnsupportedCheckpointError

BF16 = torch.bfloat16
CASE = row_case(512, 96)

pytestmark = pytest.mark.usefixtures("single_rank")


def usual(model: str) -> list[str]:
    return models.matching([r"_proj$", r"\bW\w+$"], models.linears(model))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "checkpoint"
    return models.make(path, "qwen3", usual("qwen3"), ignore=["lm_head"])


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "checkpoint"
    ignore = ["lm_head", "re:.*gate$"]
    return models.make(path, "qwen3-moe", usual("qwen3-moe"), ignore=ignore)


def dummy_loaded(build: Any) -> Any:
    load_config = LoadConfig(load_format="dummy")
    with set_current_vllm_config(VllmConfig(load_config=load_config)):
        layer = build()
        # Values in uninitialized memory.
        for parameter in layer.parameters():
            if not parameter.is_floating_point():
                parameter.data.fill_(-77)
        DummyModelLoader(load_config).load_weights(layer, None)
    return layer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_weights(scheme: str) -> None:
    layer = dummy_loaded(
        lambda: CASE.build(
            bias=True,
            params_dtype=BF16,
            quant_config=config_of("re:.*", scheme),
            prefix="layer",
        )
    )
    layer.quant_method.process_weights_after_loading(layer)
    assert layer(activations(5, CASE.k, BF16))[0].isfinite().all()


@quantized_experts.factory_needed
@pytest.mark.parametrize("scheme", quantized_experts.SERVED)
def test_dummy_weights_of_experts(scheme: str) -> None:
    sizes = quantized_experts.Sizes(experts=4, hidden=256, intermediate=256, top_k=2)
    _, config, _ = quantized_experts.compressed_experts(sizes, scheme, BF16)
    runner = dummy_loaded(lambda: quantized_experts.build(sizes, config, BF16))
    layer = runner.routed_experts
    layer.quant_method.process_weights_after_loading(layer)
    x = activations(5, sizes.hidden, BF16)
    with set_current_vllm_config(VllmConfig()):
        y = quantized_experts.run(runner, x, quantized_experts.routing(sizes, 5))
    assert y.isfinite().all()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-channel"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "modernbert"])
def test_dummy_model(tmp_path: Path, name: str, scheme: str) -> None:
    """There are no files that the config would have to agree with."""
    path = models.make(tmp_path / "checkpoint", name, [], scheme=scheme)
    (path / "model.safetensors").unlink()
    models.load(path, load_format="dummy")


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_saving_is_refused(
    tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    loaded = models.load(request.getfixturevalue(model))
    with pytest.raises(UnsupportedCheckpointError, match="cannot be saved") as error:
        ShardedStateLoader.save_model(loaded, str(tmp_path))
    assert "layer model.layers.0." in str(error.value)
    assert Remedy.LOAD_CHECKPOINT in str(error.value)
    assert not list(tmp_path.iterdir())


def test_state_of_a_block_is_not_refused(dense: Path) -> None:
    """Offloading to the CPU calls it in each forward."""
    loaded: Any = models.load(dense)
    assert "mlp.down_proj.weight" in loaded.model.layers[1].state_dict()


@register_model_loader("fills_nothing")
class FillsNothing(BaseModelLoader):
    def download_model(self, model_config: Any) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        pass


@register_model_loader("fills_by_itself")
class FillsByItself(FillsNothing):
    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        for parameter in model.parameters():
            default_weight_loader(parameter, torch.ones_like(parameter))


# Load formats of vllm-ascend, which is not installed here.
for name in ("netloader", "rfork"):
    register_model_loader(name)(FillsNothing)


@pytest.mark.parametrize(
    "load_format", ["sharded_state", "runai_streamer_sharded", "netloader", "rfork"]
)
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_weights_that_are_laid_out_are_refused(
    model: str, load_format: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    with pytest.raises(UnsupportedCheckpointError) as error:
        models.load(path, load_format=load_format)
    assert f"--load-format {load_format}" in str(error.value)
    assert Remedy.LOAD_CHECKPOINT in str(error.value)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_loader_that_fills_nothing(
    model: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(
        UnsupportedCheckpointError,
        match=r"did not load model\.layers\.0\.\S+, which the checkpoint",
    ) as error:
        models.load(request.getfixturevalue(model), load_format="fills_nothing")
    assert Remedy.OTHER_LOADER in str(error.value)


def test_a_loader_that_knows_no_such_names(tmp_path: Path) -> None:
    """gpt-oss's loader splits experts in its own way, or skips tensors."""
    experts = models.matching([r"experts\.\d"], models.linears("gpt_oss"))
    path = models.make(
        tmp_path / "checkpoint", "gpt_oss", experts, [r"re:.*experts.*_proj$"]
    )
    with pytest.raises(
        UnsupportedCheckpointError, match=r"layer model\.layers\.0\.mlp\.experts"
    ) as error:
        models.load(path)
    lacks.skip_if_named(error.value)
    # vllm-ascend supports no experts with biases: refused before loading.
    no_biases = current_platform.device_type == "npu"
    remedy = Remedy.QUANTIZE_AGAIN if no_biases else Remedy.OTHER_LOADER
    assert remedy in str(error.value)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_loader_that_fills_by_itself(
    model: str, request: pytest.FixtureRequest
) -> None:
    models.load(request.getfixturevalue(model), load_format="fills_by_itself")


def without_headers(path: Path) -> None:
    """Move a checkpoint's tensors to a file without headers."""
    file = path / "model.safetensors"
    torch.save(load_file(file), path / "pytorch_model.bin")
    file.unlink()


@pytest.mark.skipif(
    inspect.getsource(ModernBertModel.load_weights).count("not in params_dict") < 2,
    reason="this vLLM's ModernBERT skips biases only",
)
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-channel-dynamic"])
@pytest.mark.parametrize("position", ["Wo", "Wi", "Wqkv"])
@pytest.mark.parametrize("where", ["file", "config"])
def test_a_loader_that_skips_without_headers(
    tmp_path: Path, where: str, position: str, scheme: str
) -> None:
    names = usual("modernbert")
    ignore = []
    if where == "file":
        ignore = [f"re:.*{position}"]
    else:
        names = [name for name in names if position not in name]
    path = models.make(
        tmp_path / "checkpoint", "modernbert", names, ignore=ignore, scheme=scheme
    )
    without_headers(path)
    with pytest.raises(
        UnsupportedCheckpointError, match=rf"layer \S+\.{position}|{position}"
    ):
        models.load(path)


def test_headers_that_cannot_be_read_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = models.make(
        tmp_path / "checkpoint", "qwen3", usual("qwen3"), ignore=["lm_head"]
    )
    without_headers(path)
    with caplog.at_level("WARNING", logger="vllm.ascend_ct.quantization"):
        models.load(path)
    (record,) = [r for r in caplog.records if "headers" in r.getMessage()]
    assert record.levelname == "WARNING" and str(path) in record.getMessage()


def test_headers_are_not_kept(dense: Path) -> None:
    """They are neither pickled to other processes nor kept after loading."""
    vllm_config = models.config_of(dense)
    config: Any = vllm_config.quant_config
    assert len(pickle.dumps(config)) < 10_000
    models.load_with(vllm_config, vllm_config.model_config)
    assert config.checkpoint._headers is None
    copy = pickle.loads(pickle.dumps(config))
    assert copy.checkpoint._source == (str(dense), None)
