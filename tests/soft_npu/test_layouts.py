# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""FRACTAL_NZ, and operators that read memory in another layout."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_npu
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from pytest_mock import MockerFixture
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearLayerConfig,
)
from vllm.scalar_type import ScalarType, scalar_types

from tools.bench.bench_load import parameters
from tools.bench.bench_load_experts import SCHEMES, Sizes, loaded
from vllm_ascend_ct.fused_moe.experts.ascend_moe import stored_weight
from vllm_ascend_ct.kernels.linear import functional
from vllm_ascend_ct.kernels.linear.mixed_precision.ascend import (
    AscendWNA16LinearKernel,
    packed_type,
)
from vllm_ascend_ct.ops.emulated.weights import unpack_int4
from vllm_ascend_ct.ops.limits import LIMITS, WeightQuantBatchMatmulLimits
from vllm_ascend_ct.ops.soc import Soc
from vllm_ascend_ct.weights import int_quantized, pack_quantized

pytestmark = pytest.mark.soft_npu
NZ, ND = 29, 2
E, N, K = 2, 64, 96


def nz(tensor: torch.Tensor) -> torch.Tensor:
    return torch_npu.npu_format_cast(tensor, NZ)


def in_nz(tensor: torch.Tensor) -> bool:
    return int(torch_npu.get_npu_format(tensor)) == NZ


def int8(*sizes: int) -> torch.Tensor:
    return torch.randint(-127, 128, sizes, dtype=torch.int8)


@pytest.mark.parametrize("sizes", [(64, 96), (3, 64, 32)])
def test_copy_to_the_same_layout(sizes: tuple[int, ...], internal_format: None) -> None:
    """As a reload does it, also if the old values were multiplied with before."""
    old, new = torch.rand(sizes).bfloat16(), torch.rand(sizes).bfloat16()
    x, weight = torch.eye(sizes[-2], dtype=torch.bfloat16), nz(old.npu())
    x = x.expand(*sizes[:-2], -1, -1).contiguous().npu()
    assert torch.equal((x @ weight).cpu(), old)
    weight.copy_(nz(new.npu()))
    assert in_nz(weight) and torch.equal((x @ weight).cpu(), new)


@pytest.mark.parametrize("sizes", [(64, 96), (17, 33), (3, 16, 32), (2, 5, 70)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_there_and_back(
    sizes: tuple[int, ...], dtype: torch.dtype, internal_format: None
) -> None:
    values = int8(*sizes).to(dtype)
    cast = nz(values.npu())
    assert in_nz(cast) and cast.shape == values.shape
    assert torch.equal(cast.cpu(), values)
    assert torch.equal(torch_npu.npu_format_cast(cast, ND).cpu(), values)


def test_tiles_are_in_memory(internal_format: None) -> None:
    """Tiles of 16 rows of 32 bytes; the tiles of a column are contiguous."""
    values = int8(32, 64)
    tiles = values.view(2, 16, 2, 32).permute(2, 0, 1, 3).flatten()
    memory = torch.ops.soft_npu.storage_bytes(nz(values.npu()))
    assert torch.equal(memory.view(torch.int8), tiles)


def test_default_stays_in_rows() -> None:
    """As on a chip, casts silently do nothing by default."""
    torch_npu.npu.config.allow_internal_format = False
    assert not in_nz(nz(int8(32, 64).npu()))


def quant_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale = torch.ones(weight.shape[-1], device="npu")
    pertoken = torch.ones(len(x), device="npu")
    result: torch.Tensor = torch_npu.npu_quant_matmul(
        x, weight, scale, pertoken_scale=pertoken, output_dtype=torch.bfloat16
    )
    return result.cpu()


def test_products_read_tiles(internal_format: None) -> None:
    x, weight = int8(4, K).npu(), int8(K, N).npu()
    assert torch.equal(quant_matmul(x, nz(weight)), quant_matmul(x, weight))
    transposed = nz(weight.t().contiguous()).t()
    assert torch.equal(quant_matmul(x, transposed), quant_matmul(x, weight))


def test_what_is_written_anew_is_read_anew(internal_format: None) -> None:
    """A reload copies into the parameter."""
    x, weight, other = int8(4, K).npu(), nz(int8(K, N).npu()), int8(K, N).npu()
    before = quant_matmul(x, weight)
    weight.copy_(other)
    assert in_nz(weight)
    after = quant_matmul(x, weight)
    assert torch.equal(after, quant_matmul(x, other))
    assert not torch.equal(after, before)


def test_other_operators_refuse_tiles(internal_format: None) -> None:
    with pytest.raises(RuntimeError, match=r"aten::add.Tensor\(self\): FRACTAL_NZ"):
        nz(int8(32, 64).npu()) + 1


def test_view_that_is_cast_comes_out_wrong(internal_format: None) -> None:
    """torch_npu converts with the sizes that the memory was allocated with."""
    x, weight = int8(4, K).npu(), int8(N, K).npu()
    rows = weight.cpu().t().contiguous()
    weight.view(K, N).copy_(rows)
    view = weight.view(K, N)
    right = quant_matmul(x, rows.npu())
    assert torch.equal(quant_matmul(x, view), right), "in rows it does not matter"
    assert torch.equal(quant_matmul(x, nz(rows.npu())), right)
    assert not torch.equal(quant_matmul(x, nz(view)), right)


def test_view_as_another_type_cannot_be_cast(internal_format: None) -> None:
    packed = torch.zeros(K, N // 4, dtype=torch.int32, device="npu")
    with pytest.raises(RuntimeError, match="resize storage without base format"):
        nz(packed.view(torch.int8))


@pytest.mark.parametrize("name", ["w8a8-channel", "w4a8-channel", "w4a8-g256"])
def test_layout_of_experts(
    name: str, internal_format: None, mocker: MockerFixture
) -> None:
    """In either layout the products are the same."""
    (scheme,) = (scheme for scheme in SCHEMES if scheme.name == name)
    sizes = Sizes(experts=E, hidden=512, intermediate=256)
    rows, row_scale = int8(6, 512).npu(), torch.rand(6).npu()
    counts = torch.tensor([4, 2]).npu()
    results = []
    made = loaded(sizes, scheme)
    loaded_layer = made.layer
    for prefers_nz in (True, False):
        mocker.patch("vllm_ascend_ct.ascend_base.prefers_nz", return_value=prefers_nz)
        layer = copy.deepcopy(loaded_layer).npu()
        unfused = type(made)(layer, made.moe, fuses=lambda _: False)
        for product, (k, n) in sizes.products.items():
            place = stored_weight(layer, product)[1].data_ptr()
            unfused._lay_out(product, k, n)
            weight = stored_weight(layer, product)[1]
            assert in_nz(weight) == prefers_nz
            assert prefers_nz or weight.data_ptr() == place, "it was copied"
        hidden = unfused.gate(rows, row_scale, counts)
        results.append(unfused.down(*hidden, counts).cpu())
    assert results[0].isfinite().all() and results[0].count_nonzero()
    assert torch.equal(*results)


def test_layout_of_packed_int8(internal_format: None) -> None:
    """The layout of the 310P."""
    x, values = int8(4, K).npu(), int8(N, K)
    packed = pack_to_int32(values, 8).npu()
    rows = pack_quantized.to_int8(packed, 8, K)
    weight = int_quantized.to_npu_weight(rows, nz=False, transposed_nz=True)
    assert in_nz(weight.t())
    expected = quant_matmul(x, values.t().contiguous().npu())
    assert torch.equal(quant_matmul(x, weight), expected)


def test_slice_of_int4_is_misread() -> None:
    """The offset is in units of int32 for op-plugin, and of int4 for aclnn."""
    packed = torch.randint(-(2**31), 2**31, (2 * N, K // 8), dtype=torch.int32)
    values = unpack_int4(packed).t().to(torch.bfloat16)
    x = torch.eye(K, dtype=torch.bfloat16, device="npu")
    scale = torch.ones(1, 2 * N, dtype=x.dtype, device="npu")
    operands = x, packed.npu().t(), scale
    assert torch.equal(functional.weight_quant_matmul(*operands).cpu(), values)
    parts = functional.weight_quant_matmul(*operands, max_n=N).cpu()
    assert torch.equal(parts[:, :N], values[:, :N]), "its offset is 0"
    # 64 rows of 12 words: an offset of 768 int4, which are 96 words or 8 rows.
    assert torch.equal(parts[:, N:], values[:, 8 : 8 + N])


INT4 = [packed_type(4, True), packed_type(4, False), scalar_types.int4]


@pytest.mark.parametrize("weight_type", INT4, ids=str)
def test_layer_in_parts(weight_type: ScalarType, mocker: MockerFixture) -> None:
    """More outputs than the operator supports, like an output head."""
    limits = dataclasses.replace(
        LIMITS[Soc.A2],
        weight_quant_batchmatmul=WeightQuantBatchMatmulLimits(max_size=K),
    )
    mocker.patch.dict(LIMITS, {Soc.A2: limits})
    groups, zero_points = 3, weight_type == scalar_types.uint4
    config = MPLinearLayerConfig(
        full_weight_shape=(K, 2 * N),
        partition_weight_shape=(K, 2 * N),
        weight_type=weight_type,
        act_type=torch.bfloat16,
        group_size=K // groups,
        zero_points=zero_points,
        has_g_idx=False,
    )
    values = torch.randint(-8, 8, (2 * N, K), dtype=torch.int8)
    scale = torch.rand(2 * N, groups).bfloat16()
    packed = pack_to_int32(values, 4)
    tensors = {"weight_packed": packed, "weight_scale": scale}
    if weight_type == scalar_types.int4:
        tensors["weight_packed"] = values
    shift = torch.zeros(2 * N, groups, dtype=torch.int8)
    if zero_points:
        shift = torch.randint(-8, 8, (2 * N, groups), dtype=torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(shift, 4, packed_dim=0)
    layer = parameters(**tensors).npu()
    kernel = AscendWNA16LinearKernel(
        config, "weight_packed", "weight_scale", "weight_zero_point", None
    )
    kernel.process_weights_after_loading(layer)
    x = torch.eye(K, dtype=torch.bfloat16, device="npu")
    shifted = values.view(2 * N, groups, -1).float() - shift.unsqueeze(-1)
    expected = (shifted * scale.float().unsqueeze(-1)).view(2 * N, K).t()
    assert torch.equal(kernel.apply_weights(layer, x).cpu(), expected.bfloat16())


def test_named_layouts_are_compared(tmp_path: Path) -> None:
    """Like a user with a chip, outside of the clone."""
    out = tmp_path / "report.json"
    module = "vllm_ascend_ct.cli.main"
    command = [sys.executable, "-m", module, "check-npu", "--out", str(out)]
    command += ["--k", "512", "--n", "256", "--tokens", "1", "16"]
    variables = os.environ | {"VLLM_PLUGINS": "ascend_ct"}
    subprocess.run(command, cwd=tmp_path, env=variables, check=True)
    report = json.loads(out.read_text())
    assert report["device"] == "npu" and report["chip"] != "emulated"
    assert {found["fault"] for found in report["results"]} == {None}
    kinds = {found["kind"] for found in report["results"]}
    assert {"w8a8-static", "w4a8-group experts"} <= kinds
