# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Broken checkpoints are refused, with vLLM's own loader."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_mock import MockerFixture
from safetensors.torch import load_file

from tests import lacks
from tests.layers.quantized_layers import MULTIPLIED
from tests.loading.models import load_model
from tools.checkpoints import tiny_moe
from tools.checkpoints.malform import (
    EXPERT_KINDS,
    EXPERTS_RECIPE,
    FLOAT_KINDS,
    FLOAT_RECIPE,
    IGNORED_KINDS,
    INT4_IN_INT8,
    KINDS,
    PACKED,
    RECIPE,
    STATIC,
    THREE_BITS,
    Kind,
    malform,
)
from vllm_ascend_ct.errors import UnsupportedCheckpointError
from vllm_ascend_ct.kernels.linear.microscaled import AscendMxMixin
from vllm_ascend_ct.ops import soc
from vllm_ascend_ct.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (  # noqa: E501
    AscendCTW8A8Fp8,
)

pytestmark = pytest.mark.usefixtures("single_rank")


def check_refused(
    valid: Path,
    kind: Kind,
    broken: Path,
    errors: type[Exception] = UnsupportedCheckpointError,
) -> None:
    malform(valid, kind, broken)
    with pytest.raises(errors) as error:
        load_model(broken)
    lacks.skip_if_named(error.value)
    assert re.search(kind.names, str(error.value)), error.value


@pytest.fixture(scope="module")
def valid(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(RECIPE)


def test_the_checkpoint_itself_is_loaded(valid: Path) -> None:
    load_model(valid)


@pytest.mark.parametrize("name", KINDS)
def test_refused(valid: Path, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    # If a file cannot be read at all, safetensors or vLLM raise the error.
    errors = UnsupportedCheckpointError if kind.file is None else Exception
    check_refused(valid, kind, tmp_path / "broken", errors)


@pytest.fixture(scope="module")
def valid_experts(
    checkpoint: Callable[..., Path], moe_model: Callable[[str], Path]
) -> Path:
    base = moe_model("qwen3-moe")
    return checkpoint(EXPERTS_RECIPE, base=base, ignore=tiny_moe.IGNORE)


def test_experts_themselves_are_loaded(valid_experts: Path) -> None:
    load_model(valid_experts)


@pytest.mark.parametrize("name", EXPERT_KINDS)
def test_experts_are_refused(valid_experts: Path, tmp_path: Path, name: str) -> None:
    check_refused(valid_experts, EXPERT_KINDS[name], tmp_path / "broken")


@pytest.fixture(scope="module")
def valid_floats(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(FLOAT_RECIPE)


def test_floats_themselves_are_loaded(valid_floats: Path) -> None:
    load_model(valid_floats)


@pytest.mark.parametrize("name", FLOAT_KINDS)
def test_floats_are_refused(valid_floats: Path, tmp_path: Path, name: str) -> None:
    check_refused(valid_floats, FLOAT_KINDS[name], tmp_path / "broken")


@pytest.mark.parametrize("name", IGNORED_KINDS)
def test_scales_of_inputs_that_stay_in_16_bits(
    valid_floats: Path, tmp_path: Path, name: str
) -> None:
    malform(valid_floats, IGNORED_KINDS[name], tmp_path / "other")
    load_model(tmp_path / "other")


FLOAT8_KINDS = [
    name
    for name in FLOAT_KINDS
    if name.startswith("fp8-")
    and not any(other in name for other in ("large", "per-channel"))
]


@pytest.fixture(scope="module")
def valid_float8(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(dict.fromkeys(FLOAT_RECIPE, MULTIPLIED[0]))


def test_float8_that_a5_multiplies_is_loaded(
    valid_float8: Path, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    monkeypatch.setattr(soc, "_default", soc.Soc.A5)
    processed = mocker.spy(AscendCTW8A8Fp8, "process_weights_after_loading")
    load_model(valid_float8)
    assert processed.call_count > 4


@pytest.mark.parametrize("name", FLOAT8_KINDS)
def test_float8_that_a5_multiplies_is_refused(
    valid_float8: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soc, "_default", soc.Soc.A5)
    check_refused(valid_float8, FLOAT_KINDS[name], tmp_path / "broken")


# Kinds that also break the weights of a layer that is MXFP4 instead of NVFP4.
MXFP4_KINDS = ["missing", "scale-missing", "columns-fewer", "is-int8", "unpacked"]
MXFP4_KINDS += ["scale-is-bfloat16", "groups-of-32", "bias-missing"]
MX_KINDS = [name for name in FLOAT_KINDS if name.startswith("mxfp8-")]
MX_KINDS += [f"nvfp4-{name}" for name in MXFP4_KINDS]


@pytest.fixture(scope="module")
def valid_mx(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint({**FLOAT_RECIPE, "re:.*layers.1.self_attn.*_proj": "mxfp4"})


def test_mx_that_a5_multiplies_is_loaded(
    valid_mx: Path, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    monkeypatch.setattr(soc, "_default", soc.Soc.A5)
    processed = mocker.spy(AscendMxMixin, "replace_weight")
    load_model(valid_mx)
    # Fused projections of attention, its output, and those of the gated unit.
    assert processed.call_count == 4


@pytest.mark.parametrize("name", MX_KINDS)
def test_mx_that_a5_multiplies_is_refused(
    valid_mx: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soc, "_default", soc.Soc.A5)
    check_refused(valid_mx, FLOAT_KINDS[name], tmp_path / "broken")


def test_the_corpus_is_large_enough() -> None:
    assert len(KINDS) > 40 and len(EXPERT_KINDS) > 20 and len(FLOAT_KINDS) > 50


NAMES = [
    f"{layer}.{name}"
    for layer, names in {
        PACKED: ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"],
        STATIC: ["weight", "weight_scale", "input_scale", "input_zero_point"],
        INT4_IN_INT8: ["weight", "weight_scale"],
        THREE_BITS: ["weight_packed", "weight_scale", "weight_shape"],
    }.items()
    for name in names
]
DTYPES = [torch.int8, torch.uint8, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Another dtype, size, order or value of one tensor."""
    name = draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(["dtype", "cut", "repeat", "flat", "swap", "value"]))
    dtype = draw(st.sampled_from(DTYPES))
    amount = draw(st.integers(1, 3))
    value = draw(st.sampled_from([float("nan"), float("inf"), -1.0, 0.0]))

    def mutate(tensor: torch.Tensor) -> torch.Tensor:
        if kind == "dtype":
            return tensor.to(dtype)
        if kind == "cut":
            return tensor[..., :-amount]
        if kind == "repeat":
            return tensor.repeat_interleave(amount + 1, dim=0)
        if kind == "flat":
            return tensor.flatten()
        if kind == "swap" and tensor.t().shape != tensor.shape:
            return tensor.t()
        if tensor.is_floating_point():
            tensor = tensor.clone()
            tensor.view(-1)[0] = value
        return tensor

    return name, mutate


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(mutation=mutations())
def test_no_mutation_is_served_wrong(
    valid: Path,
    tmp_path_factory: pytest.TempPathFactory,
    mutation: tuple[str, Callable[[torch.Tensor], torch.Tensor]],
) -> None:
    """Either refused by name, or the same values in the same shape."""
    name, mutate = mutation
    before = load_file(valid / "model.safetensors")[name]
    after = mutate(before).contiguous()
    broken = tmp_path_factory.mktemp("mutations") / "broken"
    kind = Kind(name, tensors=lambda tensors: tensors.update({name: after}))
    malform(valid, kind, broken)
    same = before.shape == after.shape and torch.equal(before.double(), after.double())
    try:
        load_model(broken)
    except UnsupportedCheckpointError as error:
        assert name.rpartition(".")[2] in str(error)
        assert not torch.equal(before, after) or before.dtype != after.dtype
    else:
        assert same
