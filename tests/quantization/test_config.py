# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_mock import MockerFixture
from transformers import Qwen2Config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

from tests import lacks
from tests.layers import quantized_experts
from tests.layers.quantized_layers import FUSED
from tools.numerics import enumerate_configs
from vllm_ascend_ct import compat
from vllm_ascend_ct.errors import (
    PlatformError,
    Remedy,
    UnsupportedCheckpointError,
)
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
)
from vllm_ascend_ct.quantization.compressed_tensors import (
    compressed_tensors,
    linear_method,
)
from vllm_ascend_ct.quantization.compressed_tensors.compressed_tensors import (
    AscendCTConfig,
)
from vllm_ascend_ct.quantization.compressed_tensors.linear_method import (
    AscendCTLinearMethod,
)

PREFIX = "model.layers.3.mlp.down_proj"

pytestmark = pytest.mark.usefixtures("single_rank")


def ints(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


def floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {**ints(bits, strategy, **more), "type": "float"}


W4 = ints(4, "group", group_size=128)
W8 = ints(8, "channel")
TOKEN = ints(8, "token", dynamic=True)


def config(
    weights: Any,
    inputs: Any = None,
    fmt: str = "pack-quantized",
    targets: Any = ("Linear",),
    group: Any = None,
    **more: Any,
) -> AscendCTConfig:
    scheme = {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        **(group or {}),
    }
    made = get_quantization_config("compressed-tensors").from_config(
        {
            "config_groups": {"group_0": scheme},
            "format": fmt,
            **more,
        }
    )
    assert type(made) is AscendCTConfig
    return made


def linear(
    quant_config: Any, k: int = 256, dtype: torch.dtype = torch.bfloat16, **more: Any
) -> ReplicatedLinear:
    return ReplicatedLinear(
        k,
        64,
        params_dtype=dtype,
        quant_config=quant_config,
        prefix=PREFIX,
        **more,
    )


def test_what_vllm_ascend_reads_off_any_config() -> None:
    made = config(W4)
    assert made.quant_description == {}
    assert made.enable_fa_quant is made.enable_c8_quant is False
    assert made.c8_quant_layers == made.kvcache_quant_layers == ()
    assert not hasattr(made, "get_kv_quant_dtype")
    layer = ReplicatedLinear(8, 8)
    method = made.get_quant_method(layer, PREFIX, tid2eid=None)
    assert isinstance(method, AscendCTLinearMethod)


def test_linear_method_is_what_vllm_ascend_expects() -> None:
    layer = linear(config(W8, TOKEN, "int-quantized"))
    # None there means "not quantized". Each layer has its own object.
    assert layer.quant_method.quant_method is layer.scheme
    assert type(layer.quant_method).__name__ in WEIGHT_LOADER_V2_SUPPORTED


def test_parameters_follow_a_layer_that_does_not_split() -> None:
    """Unlike upstream's, vllm-ascend's constructors do not correct the rank."""
    layer = ColumnParallelLinear(256, 64, params_dtype=torch.bfloat16, disable_tp=True)
    layer.tp_rank, layer.tp_size = 5, 8
    made = config(W4)
    layer.scheme = made.get_scheme(layer, PREFIX)
    del layer.weight
    args = made.get_scheme_dict(layer, PREFIX)
    AscendCTLinearMethod(made, args).create_weights(
        layer,
        input_size_per_partition=256,
        output_partition_sizes=[64],
        input_size=256,
        output_size=64,
        params_dtype=torch.bfloat16,
        weight_loader=layer.weight_loader_v2,
    )
    assert layer.weight_packed.tp_rank == layer.weight_scale.tp_rank == 5
    assert layer.weight_packed.tp_size == layer.weight_scale.tp_size == 8


def test_ignored_and_unmatched_layers_stay_unquantized() -> None:
    ignored = linear(config(W4, ignore=[PREFIX]))
    assert isinstance(ignored.quant_method, UnquantizedLinearMethod)
    made = config(W4)
    made.target_scheme_map = {"re:.*q_proj": made.target_scheme_map["Linear"]}
    assert isinstance(linear(made).quant_method, UnquantizedLinearMethod)


REFUSED: dict[str, tuple[Any, ...]] = {
    # weights, activations, format -> part of the message
    "w4a16-g16": (
        ints(4, "group", group_size=16),
        None,
        "pack-quantized",
        "group_size=16; supported: per channel, or a multiple of 32",
    ),
    "w9a16": (ints(9, "channel"), None, "pack-quantized", "weights.num_bits=9"),
    "fp8-groups": (
        floats(8, "group", group_size=128),
        None,
        "float-quantized",
        "weights.strategy=group; supported for floating-point or unquantized inputs, "
        "unquantized outputs: tensor, channel, block",
    ),
    "fp8-asymmetric": (
        floats(8, "channel", symmetric=False),
        None,
        "float-quantized",
        "weights.symmetric=False",
    ),
    "fp8-int8-inputs": (
        floats(8, "channel"),
        TOKEN,
        "float-quantized",
        "input_activations=int8 strategy=token dynamic=True symmetric=True",
    ),
    "mxfp8-without-exponents": (
        floats(8, "group", group_size=32),
        None,
        "mxfp8-quantized",
        "weights.scale_dtype=None",
    ),
    "nvfp4-groups": (
        floats(4, "tensor_group", group_size=32),
        None,
        "nvfp4-pack-quantized",
        "weights.group_size=32; supported for floating-point or unquantized inputs, "
        "unquantized outputs: 16",
    ),
    "w4a4": (
        W4,
        ints(4, "token", dynamic=True),
        "int-quantized",
        "input_activations=int4 strategy=token dynamic=True",
    ),
    "w4-static-fp8-activations": (
        W4,
        floats(8, "tensor"),
        "pack-quantized",
        "input_activations=float8 strategy=tensor",
    ),
    "w8a8-group-weights": (
        ints(8, "group", group_size=128),
        TOKEN,
        "int-quantized",
        "weights.strategy=group; supported for int8 inputs, dynamic per token: channel",
    ),
    "w8a8-asymmetric-weights": (
        ints(8, "channel", symmetric=False),
        TOKEN,
        "int-quantized",
        "weights.symmetric=False",
    ),
    "w8a8-static-packed": (
        W8,
        ints(8, "tensor"),
        "pack-quantized",
        "format=pack-quantized; supported for int8 inputs, static per tensor: int-q",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    weights, inputs, fmt, message = REFUSED[name]
    with pytest.raises(UnsupportedCheckpointError) as error:
        linear(config(weights, inputs, fmt))
    text = str(error.value)
    for part in (message, f"layer {PREFIX}", "Supported: ", "Quantize the model again"):
        assert part in text


def test_fp8_inputs_beside_integers_stay_in_16_bits(mocker: MockerFixture) -> None:
    info_once = mocker.patch.object(compressed_tensors.logger, "info_once")
    layer = linear(config(W4, floats(8, "token", dynamic=True)))
    assert type(layer.scheme) is CompressedTensorsWNA16
    text, *values = info_once.call_args.args
    assert text % tuple(values) == (
        "W4A8 with FP8 activations is served as W4A16, with unquantized activations."
    )


def test_resolving_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_RESOLVE", "0")
    message = (
        "FP8 weights would have to be resolved to 16 bits, which "
        "VLLM_ASCEND_CT_RESOLVE=0 forbids .*"
        "Unset VLLM_ASCEND_CT_RESOLVE, or quantize the model again"
    )
    with pytest.raises(UnsupportedCheckpointError, match=message):
        linear(config(floats(8, "channel"), None, "float-quantized"))


@pytest.mark.parametrize("soc", ["310P", "A5"])
def test_w4a8_on_a_chip_without_its_operator(
    monkeypatch: pytest.MonkeyPatch, soc: str
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    weights = ints(4, "channel")
    if soc == "310P":
        with pytest.raises(UnsupportedCheckpointError, match="4-bit weights"):
            linear(config(weights, TOKEN, "int-quantized"), dtype=torch.float16)
    else:
        layer = linear(config(weights, TOKEN, "int-quantized"))
        assert type(layer.scheme.kernel) is AscendWNA16LinearKernel


def said_of(mocker: MockerFixture, weights: dict[str, Any]) -> str:
    """What is logged about a W4A8 layer. vLLM's logger logs it once per process."""
    info_once = mocker.patch.object(linear_method.logger, "info_once")
    linear(config(weights, TOKEN, "int-quantized"))
    text, *values = info_once.call_args.args
    return str(text % tuple(values))


def test_what_is_left_unquantized_is_said(mocker: MockerFixture) -> None:
    assert said_of(mocker, ints(4, "group", group_size=64)) == (
        "W4A8 is served as W4A16, with unquantized activations: group_size=64; "
        "supported: per channel, 256."
    )


def test_exchanged_kernel_is_said(mocker: MockerFixture) -> None:
    """Logged after upstream's line, which names the other kernel."""
    assert said_of(mocker, ints(4, "channel")) == (
        "Using AscendWNA8LinearKernel for CompressedTensorsW4A8Int (W4A8) instead of "
        "AscendWNA16LinearKernel, which does not quantize activations."
    )


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "actorder": ({"weights": {**W4, "actorder": "group"}}, "weights.actorder=group"),
    "actorder-alias": (
        {"weights": {**W4, "actorder": "dynamic"}},
        "weights.actorder=dynamic",
    ),
    "sparsity": (
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config.format=sparse-24-bitmask",
    ),
    "format": ({"fmt": "pack-quantized-2"}, "format=pack-quantized-2"),
    "marlin-24": ({"fmt": "marlin-24"}, "format=marlin-24"),
    # A format of compressed-tensors 0.20.
    "mxfp6": ({"fmt": "mxfp6-pack-quantized"}, "format=mxfp6-pack-quantized"),
    "format-of-a-group": (
        {"group": {"format": "mxfp6-pack-quantized"}},
        "config_groups.group_0.format=mxfp6-pack-quantized",
    ),
    "pruned-experts": (
        {"moe_sparsity_config": {"method": "prune", "num_experts": [None, 96]}},
        "moe_sparsity_config={'method': 'prune', 'num_experts': [None, 96]}",
    ),
    "field-of-weights": ({"weights": {**W4, "codebook": 1}}, "codebook"),
    "no-weights": ({"weights": None}, "config_groups.group_0.weights"),
    "weight-only-int": ({"fmt": "int-quantized"}, "group_0.format=int-quantized"),
    "pattern": ({"targets": ["re:*"]}, "group_0.targets=re:*"),
    "pattern-to-ignore": ({"ignore": ["re:*x"]}, "quantization_config.ignore=re:*x"),
    "sparsity-text": ({"sparsity_config": "bitmask"}, "sparsity_config.format=bitmask"),
    "group-size": ({"weights": ints(4, "group")}, "group_size"),
    "kv-cache": ({"kv_cache_scheme": {"num_bits": "many"}}, "kv_cache_scheme"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_refused_by_name(name: str) -> None:
    given, message = CONFIGS[name]
    with pytest.raises(UnsupportedCheckpointError) as error:
        config(**{"weights": W4, **given})
    text = str(error.value)
    for part in (message, "config.json, quantization_config.", "Supported: "):
        assert part in text
    # In the other cases the files agree with the config.
    is_config = name in ("no-weights", "pattern", "pattern-to-ignore")
    assert ("Correct " in text) == is_config
    assert (Remedy.QUANTIZE_AGAIN in text) != is_config


def test_fields_of_other_tools_are_said_to_be_unused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("WARNING", logger="vllm.ascend_ct.quantization"):
        made = config(W4, provider="some tool", tool={"a": [1]}, ignore=None)
    assert type(linear(made).quant_method) is AscendCTLinearMethod
    assert "quantization_config.provider='some tool' is not known" in caplog.text
    assert "quantization_config.tool={'a': [1]} is not known" in caplog.text


def test_later_major_version_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It is the version of the package and not of the format."""
    with caplog.at_level("WARNING", logger="vllm.ascend_ct.quantization"):
        made = config(W4, version="7.0.0")
    assert type(linear(made).quant_method) is AscendCTLinearMethod
    assert "written by compressed-tensors 7.0.0" in caplog.text


def test_config_as_older_releases_wrote_it() -> None:
    """Frozen status, a dense sparsity_config, and observers that no longer exist."""
    arguments = {
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "symmetric": True,
        "type": "int",
    }
    inputs = {
        **arguments,
        "dynamic": True,
        "observer": "memoryless",
        "strategy": "token",
    }
    weights = {**arguments, "dynamic": False, "observer": "mse", "strategy": "channel"}
    made = config(
        weights,
        inputs,
        "int-quantized",
        ignore=["lm_head"],
        global_compression_ratio=1.24,
        kv_cache_scheme=None,
        quant_method="compressed-tensors",
        quantization_status="frozen",
        sparsity_config={
            "format": "dense",
            "global_sparsity": 0.14,
            "ignore": [],
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
            "targets": ["Linear"],
        },
    )
    assert type(linear(made).quant_method) is AscendCTLinearMethod


@pytest.mark.parametrize("actorder", ["weight", "static", None])
def test_actorder_that_only_calibration_used(actorder: str | None) -> None:
    made = config({**W4, "actorder": actorder})
    assert type(linear(made).scheme) is CompressedTensorsWNA16


def test_one_target_in_two_groups() -> None:
    groups = {
        name: {"targets": ["Linear"], "weights": weights}
        for name, weights in (("group_0", W4), ("group_1", W8))
    }
    with pytest.raises(
        UnsupportedCheckpointError,
        match="group_1.targets=Linear.*Correct config_groups.group_1.targets",
    ):
        AscendCTConfig.from_config(
            {"config_groups": groups, "format": "pack-quantized"}
        )


@pytest.mark.parametrize("others", [["Linear"], ["re:.*[kv]_proj"], []])
def test_shards_quantized_differently(others: list[str]) -> None:
    groups = {
        "group_0": {"targets": ["re:.*q_proj"], "weights": W4},
        "group_1": {"targets": others, "weights": ints(4, "channel")},
    }
    made = AscendCTConfig.from_config(
        {"config_groups": groups, "format": "pack-quantized"}
    )
    made.packed_modules_mapping = FUSED
    with pytest.raises(UnsupportedCheckpointError, match="Shards of one layer"):
        QKVParallelLinear(256, 64, 4, quant_config=made, prefix="layers.0.qkv_proj")


def test_shards_of_different_groups_with_one_scheme() -> None:
    groups = {
        "group_0": {"targets": ["re:.*q_proj"], "weights": W4},
        "group_1": {
            "targets": ["re:.*[kv]_proj"],
            "weights": {**W4, "observer": "mse", "actorder": "static"},
        },
    }
    made = AscendCTConfig.from_config(
        {"config_groups": groups, "format": "pack-quantized"}
    )
    made.packed_modules_mapping = FUSED
    layer = QKVParallelLinear(
        256,
        64,
        4,
        params_dtype=torch.bfloat16,
        quant_config=made,
        prefix="layers.0.qkv_proj",
    )
    assert type(layer.scheme) is CompressedTensorsWNA16


@pytest.mark.parametrize(
    ("build", "enough"),
    [
        pytest.param(
            enumerate_configs.linear, 90 if lacks.is_older() else 100, id="linear"
        ),
        pytest.param(
            enumerate_configs.experts,
            80,
            id="experts",
            marks=quantized_experts.factory_needed,
        ),
    ],
)
def test_every_config_is_served_or_refused(build: Any, enough: int) -> None:
    outcomes = enumerate_configs.count(AscendCTConfig, torch.bfloat16, build)
    assert outcomes.total() > 512
    served = {name for name in outcomes if " with Ascend" in name}
    assert set(outcomes) == served | {"refused"}
    assert sum(outcomes[name] for name in served) > enough
    floats = enumerate_configs.float_configs
    outcomes = enumerate_configs.count(AscendCTConfig, torch.bfloat16, build, floats)
    assert outcomes.total() > 512
    assert set(outcomes) == {enumerate_configs.RESOLVED, "refused"}
    # FP8 in 3 layouts, 2 formats, 5 kinds of inputs; MXFP8; MXFP4 and NVFP4 with 2.
    assert outcomes[enumerate_configs.RESOLVED] == 3 * 2 * 5 + 5 + 2 * 5 + 2 * 5


def test_what_a5_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    build, floats = enumerate_configs.linear, enumerate_configs.float_configs
    outcomes = enumerate_configs.count(AscendCTConfig, torch.bfloat16, build, floats)
    assert outcomes.pop("refused") and outcomes.pop(enumerate_configs.RESOLVED)
    assert outcomes == {
        # In 2 layouts and 2 formats.
        "AscendCTW8A8Fp8 with AscendFP8ScaledMMLinearKernel": 2 * 2,
        # With inputs in the format of the weights.
        "CompressedTensorsW8A8Mxfp8 with AscendMxfp8LinearKernel": 1,
        # With or without the dtype of the scales.
        "CompressedTensorsW4A4Mxfp4 with AscendMxfp4LinearKernel": 2,
    }


@quantized_experts.factory_needed
def test_which_experts_a5_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A5")
    build, floats = enumerate_configs.experts, enumerate_configs.float_configs
    outcomes = enumerate_configs.count(AscendCTConfig, torch.bfloat16, build, floats)
    assert outcomes.pop("refused") and outcomes.pop(enumerate_configs.RESOLVED)
    assert outcomes == {
        # In 2 formats.
        "AscendCTFp8MoEMethod with AscendFp8Experts": 2,
        "AscendCTMxfp8MoEMethod with AscendMxExperts": 1,
        "AscendCTMxfp4MoEMethod with AscendMxExperts": 2,
    }


def test_int8_layers_too_large_are_refused() -> None:
    """Refused before memory for the weights is allocated."""
    with pytest.raises(UnsupportedCheckpointError, match="inner axis of size 65536"):
        ReplicatedLinear(
            65536,
            8,
            params_dtype=torch.bfloat16,
            quant_config=config(W8, TOKEN, "int-quantized"),
            prefix=PREFIX,
        )


@pytest.mark.parametrize(
    ("soc", "dtypes"),
    [("A2", [torch.float16, torch.bfloat16]), ("310P", [torch.float16])],
)
def test_model_dtypes(
    monkeypatch: pytest.MonkeyPatch, soc: str, dtypes: list[torch.dtype]
) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", soc)
    assert config(W4).get_supported_act_dtypes() == dtypes


def test_refusals_are_not_taken_for_an_unquantized_lm_head() -> None:
    """Upstream catches ValueErrors of an lm_head and serves it unquantized."""
    assert not issubclass(UnsupportedCheckpointError, ValueError)


def test_bias_that_does_not_fit_names_the_layer() -> None:
    static = config(W8, ints(8, "tensor", dynamic=False), "int-quantized")
    layer = linear(static)
    parameters = dict(layer.named_parameters())
    for name, value in (("weight", 1), ("weight_scale", 1e-9), ("input_scale", 1e-9)):
        parameter = parameters[name]
        parameter.weight_loader(parameter, torch.full_like(parameter.data, value))
    layer.bias.data.fill_(100)
    with pytest.raises(UnsupportedCheckpointError, match=f"reaches .* .layer {PREFIX}"):
        layer.quant_method.process_weights_after_loading(layer)


def transform(location: str) -> dict[str, Any]:
    return {
        "config_groups": {
            "R1": {
                "type": "hadamard",
                "apply": [{"targets": ["Linear"], "location": location}],
            }
        }
    }


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache"])
def test_transforms_of_activations_are_refused(location: str) -> None:
    with pytest.raises(
        UnsupportedCheckpointError, match=f"R1.apply.location=.*{location}"
    ):
        config(W4, transform_config=transform(location))


@pytest.mark.parametrize("location", ["weight_input", "weight_output"])
def test_transforms_merged_into_weights_are_served(location: str) -> None:
    made = config(W4, transform_config=transform(location))
    assert type(linear(made).quant_method) is AscendCTLinearMethod


def test_empty_transform_config_is_none() -> None:
    assert config(W4, transform_config={}).transform_config is None


def test_graphs_of_one_chip_and_layout_are_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of an engine's config, by vLLM, keeps cached graphs apart."""
    group = {"targets": ["Linear"], "weights": W4}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    hf_config = Qwen2Config(num_hidden_layers=1, architectures=["Qwen2ForCausalLM"])
    hf_config.quantization_config = {**quantization, "config_groups": {"all": group}}
    hf_config.save_pretrained(tmp_path)

    def hash_on(chip: str, layout: str = "") -> str:
        monkeypatch.setenv("VLLM_ASCEND_CT_SOC", chip)
        monkeypatch.setenv("VLLM_ASCEND_CT_LAYOUT", layout)
        arguments = EngineArgs(
            str(tmp_path), skip_tokenizer_init=True, max_model_len=128, dtype="bfloat16"
        )
        made = arguments.create_engine_config()
        assert type(made.quant_config) is AscendCTConfig
        return str(pickle.loads(pickle.dumps(made)).compute_hash())

    assert hash_on("A2") == hash_on("A2") != hash_on("A5")
    assert hash_on("A2", "w4a16-group=transposed") != hash_on("A2")
    with pytest.raises(PlatformError, match="Unknown layout on A2"):
        hash_on("A2", "w4a16-group=sideways")


def test_kv_cache_scheme_is_dropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    with caplog.at_level("WARNING", logger="vllm.ascend_ct.quantization"):
        made = config(W4, kv_cache_scheme=scheme)
    assert made.kv_cache_scheme is None
    assert "kv_cache_scheme is ignored" in caplog.text
    assert "only static symmetric int8 can be used" in caplog.text


def test_zero_points_that_this_vllm_would_leave_out(mocker: MockerFixture) -> None:
    """In vLLM 0.30, the scheme of packed weights with int8 activations creates none."""
    asymmetric = ints(8, "channel", symmetric=False)
    if not lacks.is_older():
        linear(config(asymmetric, TOKEN))
    mocker.patch.object(compat, "ZERO_POINTS_BESIDE_INT8", False)
    with pytest.raises(UnsupportedCheckpointError, match="Zero points of packed"):
        linear(config(asymmetric, TOKEN))
    # Schemes without zero points, or with parameters for them.
    linear(config(ints(8, "channel"), TOKEN))
    linear(config(asymmetric))
