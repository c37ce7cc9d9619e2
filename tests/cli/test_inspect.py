# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""`vllm-ascend-ct inspect`, as it is called."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.checkpoints import tiny_moe
from tools.checkpoints.malform import KINDS, RECIPE, malform
from vllm_ascend_ct.cli.main import main

# Runs the command once for each line: starting a process takes long.
REPEATED = """
import contextlib, io, json, os, sys
from vllm_ascend_ct.cli.main import main
for line in sys.stdin:
    os.environ.pop("VLLM_ASCEND_CT_SOC", None)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main(["inspect", *json.loads(line)])
    print(json.dumps([status, output.getvalue()]), flush=True)
"""
COMMAND = [sys.executable, "-m", "vllm_ascend_ct.cli.main", "inspect"]

Inspect = Callable[..., tuple[int, str]]
Found = Callable[..., tuple[int, dict[str, Any]]]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return {**clean, "COLUMNS": "160"}


@pytest.fixture(scope="module")
def inspect() -> Iterator[Inspect]:
    """Returns the exit status and the output."""
    with subprocess.Popen(
        [sys.executable, "-c", REPEATED],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        requests, results = process.stdin, process.stdout

        def run(*arguments: object) -> tuple[int, str]:
            print(json.dumps([*map(str, arguments)]), file=requests, flush=True)
            status, output = json.loads(results.readline())
            return status, output

        yield run


@pytest.fixture(scope="module")
def found(inspect: Inspect) -> Found:
    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        status, output = inspect(*arguments, "--json")
        return status, json.loads(output)

    return run


def test_mixed_schemes(found: Found, checkpoint: Callable[..., Path]) -> None:
    status, report = found(checkpoint(RECIPE), "--soc", "A3")
    rows = {row["layers"]: row for row in report["rows"]}
    assert status == 0 and report["is_served"] and report["soc"] == "A3"
    names = {name: row["scheme"] for name, row in rows.items()}
    assert names["model.embed_tokens"] == "none"
    schemes = [
        (row["scheme"], row["served_by"])
        for row in report["rows"]
        if row["scheme"] != "none"
    ]
    assert {
        ("W4A16 in groups of 32, asymmetric", "AscendWNA16LinearKernel"),
        ("W8A8 per channel, static asymmetric", "AscendInt8ScaledMMLinearKernel"),
        ("W4A8 per channel, dynamic", "AscendWNA8LinearKernel"),
        ("W3A16 in groups of 64", "AscendWNA16LinearKernel"),
    } == set(schemes)
    assert report["errors"] == [] and report["bytes_per_rank"] > 0


def test_floats(found: Found, checkpoint: Callable[..., Path]) -> None:
    status, report = found(checkpoint({"Linear": "nvfp4"}), "--soc", "A2")
    (row,) = (row for row in report["rows"] if "down_proj" in row["layers"])
    assert status == 0
    assert row["scheme"].startswith("NVFP4 W4A4 in groups of 16")
    assert row["served_by"] == "16 bits, resolved at load"
    assert "NVFP4 weights are resolved (dequantized) to 16 bits" in report["notes"][0]


def test_a_refused_layer_does_not_hide_others(
    found: Found, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    malform(checkpoint(RECIPE), KINDS["config-other-group-size"], tmp_path / "broken")
    status, report = found(tmp_path / "broken")
    refused = [row for row in report["rows"] if row["refusal"]]
    served = [row for row in report["rows"] if not row["refusal"]]
    assert status == 1 and len(served) > 4
    # Of the same name in another block.
    assert "W4A8 per channel, dynamic" in {row["scheme"] for row in served}
    assert {row["scheme"] for row in refused} == {"W4A16 in groups of 64, asymmetric"}
    assert "weight_scale" in refused[0]["refusal"]["what"]
    assert refused[0]["refusal"]["remedy"].startswith("Correct weights.strategy")


def test_ranks_that_split_experts(
    found: Found, checkpoint: Callable[..., Path], moe_model: Callable[[str], Path]
) -> None:
    """Each way of splitting them has its bytes, and one is refused."""
    path = checkpoint(
        {"re:.*experts.*_proj": "w4a16-g128"},
        base=moe_model("qwen3-moe"),
        ignore=tiny_moe.IGNORE,
    )
    sizes = []
    for arguments in ((), ("--tp", "2"), ("--tp", "2", "--ep", "4")):
        status, report = found(path, *arguments)
        (experts,) = (row for row in report["rows"] if "experts" in row["layers"])
        assert status == 0, report
        sizes.append(experts["bytes_per_rank"])
    # But for `weight_shape`, which is not split.
    assert sizes == pytest.approx([sizes[0], sizes[0] / 2, sizes[0] / 4], rel=1e-3)
    status, report = found(path, "--tp", "4")
    (experts,) = (row for row in report["rows"] if "experts" in row["layers"])
    assert status == 1
    assert experts["refusal"]["remedy"].startswith("Change tensor_parallel_size")


def test_table(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint({"Linear": "w8a8-channel-static"})
    command = [*COMMAND, str(path), "--soc", "A5"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert "AscendInt8ScaledMMLinearKernel" in result.stdout
    assert "npu_quantize (static, reciprocal) *" in result.stdout
    assert "* unproven on A5" in result.stdout


def test_one_reason_is_said_once(
    inspect: Inspect, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint({"Linear": "w4a16-g128"})
    status, output = inspect(path, "--soc", "310P", "--dtype", "float16")
    assert status == 1
    refused = [x for x in output.splitlines() if x.startswith("Refused:")]
    assert len(refused) == 1 and "qkv_proj (2)" in refused[0]
    assert output.count("4-bit weights; supported: 8") == 1


def test_what_is_no_checkpoint(found: Found, tmp_path: Path) -> None:
    status, report = found(tmp_path)
    assert status == 1 and not report["is_served"] and len(report["errors"]) == 1


@pytest.mark.parametrize(
    "arguments", [["--tp", "0"], ["--tp", "2", "--ep", "3"], ["--soc", "A4"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", "checkpoint", *arguments])
    assert exit_.value.code == 2
