# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The memory that resolved weights take is checked before loading."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from pytest_mock import MockerFixture
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from tests.loading.models import load_model
from tools.checkpoints import tiny_moe
from tools.checkpoints.make_checkpoint import FLOAT_SCHEMES
from tools.checkpoints.malform import FLOAT_RECIPE
from vllm_ascend_ct import compat
from vllm_ascend_ct.ascend_base import routed_experts, runs_on_vllm_ascend
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.ops import soc
from vllm_ascend_ct.quantization.compressed_tensors import resolving
from vllm_ascend_ct.quantization.compressed_tensors.headers import CheckpointHeaders

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture(scope="module")
def floats(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(FLOAT_RECIPE)


def quantized_sizes(path: Path) -> tuple[int, int]:
    """Bytes of the weights in the file, and their number of values."""
    data = (path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = values = 0
    del header["__metadata__"]
    for name, tensor in header.items():
        layer, _, kind = name.rpartition(".")
        in_byte = {"weight": 1, "weight_packed": 2}.get(kind, 0)
        if in_byte and f"{layer}.weight_scale" in header:
            stored += math.prod(tensor["shape"])
            values += math.prod(tensor["shape"]) * in_byte
    return stored, values


def test_memory_is_said_once(floats: Path, mocker: MockerFixture) -> None:
    warning = mocker.patch.object(resolving.logger, "warning_once")
    load_model(floats)
    (call,) = warning.call_args_list
    text, *values = call.args
    stored, count = quantized_sizes(floats)
    assert stored > 1 << 20
    sizes = f"{2 * count / 2**30:.2f} GiB, compared with {stored / 2**30:.2f} GiB in"
    assert sizes in text % tuple(values)


def test_what_does_not_fit_is_refused_before_it_is_loaded(
    floats: Path, mocker: MockerFixture
) -> None:
    _, count = quantized_sizes(floats)
    mocker.patch.object(compat, "free_memory", return_value=2 * count - 1)
    loading = mocker.patch("tests.loading.models.get_model_loader")
    message = "Resolved to 16 bits, the weights take .* GiB per rank.*Serve it on more"
    with pytest.raises(UnsupportedCheckpointError, match=message):
        load_model(floats)
    assert not loading.called


def test_what_a5_multiplies_is_not_counted(
    checkpoint: Callable[..., Path],
    moe_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
) -> None:
    """Only experts are resolved; linear layers are not."""
    monkeypatch.setattr(soc, "_default", soc.Soc.A5)
    warning = mocker.patch.object(resolving.logger, "warning_once")
    counted = mocker.spy(resolving, "_bytes")
    float8 = "fp8-tensor-dynamic"
    load_model(checkpoint(dict.fromkeys(FLOAT_RECIPE, float8)))
    assert not warning.called and not counted.called
    base = moe_model("qwen3-moe")
    path = checkpoint({"re:.*_proj": float8}, base=base, ignore=tiny_moe.IGNORE)
    load_model(path)
    (call,) = warning.call_args_list
    text, *values = call.args
    assert "FP8 weights, except those of most linear layers, are" in text % tuple(
        values
    )
    _, resolved = counted.spy_return
    _, whole = quantized_sizes(path)
    assert 0 < resolved < 2 * whole


def test_experts_that_a5_multiplies_are_not_counted(
    checkpoint: Callable[..., Path],
    moe_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
) -> None:
    """Only the output head is resolved."""
    if runs_on_vllm_ascend() and not routed_experts.asks_for_products():
        pytest.skip("this vllm-ascend multiplies experts itself")
    monkeypatch.setattr(soc, "_default", soc.Soc.A5)
    warning = mocker.patch.object(resolving.logger, "warning_once")
    counted = mocker.spy(resolving, "_bytes")
    base = moe_model("qwen3-moe")
    recipe = {"re:.*_proj": "mxfp8"}
    load_model(checkpoint(recipe, base=base, ignore=tiny_moe.IGNORE))
    assert not warning.called
    ignore = [name for name in tiny_moe.IGNORE if "head" not in name]
    recipe["re:lm_head"] = "mxfp8"
    load_model(checkpoint(recipe, base=base, ignore=ignore))
    (call,) = warning.call_args_list
    text, *values = call.args
    assert "MXFP8 weights, except those of most linear layers and experts, are" in (
        text % tuple(values)
    )
    assert not counted.called


@pytest.mark.parametrize(
    ("options", "offloads"),
    [
        ({}, False),
        ({"uva": {"cpu_offload_gb": 1}}, True),
        ({"prefetch": {"offload_group_size": 2, "offload_num_in_group": 1}}, True),
    ],
)
def test_weights_may_be_offloaded(options: dict[str, Any], offloads: bool) -> None:
    assert compat.offloads_weights(VllmConfig(offload_config=options)) is offloads


def test_a_second_model_from_the_files_is_not_counted(
    floats: Path, mocker: MockerFixture
) -> None:
    """A draft model: by then, the main model has taken its memory."""
    headers = CheckpointHeaders.read(str(floats), None)
    checkpoint = mocker.Mock(headers=headers, is_resolved=False, is_second=True)
    mocker.patch.object(compat, "free_memory", return_value=0)
    config = QuantizationConfig.model_validate(
        {"config_groups": {"g": FLOAT_SCHEMES["fp8-channel-a16"]}}
    )
    group = config.config_groups["g"]
    scheme = {
        "weights": group.weights,
        "input_activations": None,
        "format": "float-quantized",
    }
    resolving.check_resolving(scheme, "mtp.fc", checkpoint)
    checkpoint.is_resolved = checkpoint.is_second = False
    vllm_config = EngineArgs(str(floats)).create_engine_config()
    refusal = pytest.raises(UnsupportedCheckpointError, match="0.00 GiB are free")
    with set_current_vllm_config(vllm_config), refusal:
        resolving.check_resolving(scheme, "model.layers.0.fc", checkpoint)
