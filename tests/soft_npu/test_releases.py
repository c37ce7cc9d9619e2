# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform and config of a process with vllm-ascend installed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.soft_npu import engines
from tests.soft_npu.test_engine import GRAPHS, PROCESSES
from tools.soft_npu import environment, suite
from tools.soft_npu.suite import CHECKPOINTS
from vllm_ascend_ct import envs, releases

pytestmark = pytest.mark.soft_npu
PLATFORMS = {"ascend_ct": "NPUAscendCTPlatform", "ascend,ascend_ct": "NPUPlatform"}
# How an engine is configured, and how its other processes start.
SCRIPT = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

if sys.argv[2] == "main":
    config = EngineArgs(sys.argv[1], max_model_len=128).create_engine_config()
    print("SERVES", type(config.quant_config).__name__)
else:
    load_general_plugins()
    print("SERVES", get_quantization_config("compressed-tensors").__name__)

from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform

print("PLATFORM", type(current_platform).__name__)
print("MODELS", sum(
    "vllm_ascend." in str(getattr(model, "module_name", ""))
    for model in ModelRegistry.models.values()))
print("OURS", "vllm_ascend_ct.register" in sys.modules)
"""


def start(
    device: environment.Device, plugins: str | None, script: str, *arguments: str
) -> tuple[int, str]:
    """Exit code and output of a process."""
    variables = environment.variables(device) | {"HF_HUB_OFFLINE": "1"}
    for name in ("VLLM_PLUGINS", envs.ANY_RELEASE):
        variables.pop(name, None)
    if plugins is not None:
        variables["VLLM_PLUGINS"] = plugins
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=400,
    )
    return result.returncode, result.stdout + result.stderr


def report(release: str, plugins: str | None, process: str) -> dict[str, str]:
    """Code that reports the platform and config of a process."""
    checkpoint = str(CHECKPOINTS / "dense-w4a16")
    device = environment.Device(release)
    code, output = start(device, plugins, SCRIPT, checkpoint, process)
    assert code == 0, output[-3000:]
    said = (line.split() for line in output.splitlines())
    names = ("SERVES", "PLATFORM", "MODELS", "OURS")
    return {words[0]: words[1] for words in said if words and words[0] in names}


RELEASES = [
    pytest.param(name, marks=[pytest.mark.long] * (name not in suite.end_to_end()))
    for row in releases.served(on_npu=True)
    for name in row.vllm_ascend
]
IN_PARTS = [
    row.vllm_ascend[-1]
    for row in releases.served(on_npu=True)
    if row.tested is releases.Tested.IN_PARTS
]
REFUSED = {
    name: row
    for row in releases.TABLE
    for name in row.vllm_ascend
    if row.tested is releases.Tested.REFUSED
}


@pytest.mark.parametrize(
    "process", ["main", pytest.param("other", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("plugins", PLATFORMS)
@pytest.mark.parametrize("release", RELEASES)
def test_in_charge(release: str, plugins: str, process: str) -> None:
    said = report(release, plugins, process)
    assert said["SERVES"] == "AscendCTConfig"
    assert said["PLATFORM"] == PLATFORMS[plugins]


@pytest.mark.long
@pytest.mark.parametrize("process", ["main", "other"])
@pytest.mark.parametrize("plugins", PLATFORMS)
@pytest.mark.parametrize("release", REFUSED)
def test_refused(release: str, plugins: str, process: str) -> None:
    """On the real release, which is fetched when this runs for the first time."""
    device, row = environment.Device(release), REFUSED[release]
    checkpoint = str(CHECKPOINTS / "dense-w4a16")
    code, output = start(device, plugins, SCRIPT, checkpoint, process)
    assert code != 0 and "SERVES" not in output, output[-3000:]
    error = "PlatformError: This release of vllm-ascend-ct does not support vllm-ascend"
    versions = rf"{re.escape(release)} on vLLM {re.escape(row.vllm)}(\+\w+)?"
    reason = re.escape(f": {row.note} (")
    assert re.search(f"{error} {versions}{reason}", output), output[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("name", ["dense", "moe", "float experts"])
@pytest.mark.parametrize("release", IN_PARTS)
def test_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, name: str
) -> None:
    """Those that test_engine.py runs on releases that are tested end to end."""
    for variable, value in environment.variables(environment.Device(release)).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv(envs.ANY_RELEASE, raising=False)
    runs = PROCESSES[name]
    results = engines.run(runs, tmp_path / "out.json")
    for given, result in zip(runs, results, strict=True):
        engines.check_served(given, result)
        engines.check_close(given, result)
    for (process, run), (_, eager) in GRAPHS.items():
        if process == name:
            assert results[run]["tokens"] == results[eager]["tokens"]


@pytest.mark.long
@pytest.mark.parametrize("process", ["main", "other"])
@pytest.mark.parametrize("release", RELEASES)
def test_not_asked_for(release: str, process: str) -> None:
    """Nothing of ours is active; with us alone, all of its general plugins run too."""
    without = report(release, None, process)
    assert without["SERVES"] == "AscendCompressedTensorsConfig"
    assert without["PLATFORM"] == "NPUPlatform" and without["OURS"] == "False"
    assert report(release, "ascend", process)["OURS"] == "False"
    with_us = report(release, "ascend_ct", process)
    assert int(with_us["MODELS"]) == int(without["MODELS"]) > 0


LATENT_QUERY = """
import json
import sys

import torch
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

checkpoint, sizes, changes, ignore, name = json.loads(sys.argv[1])
config = EngineArgs(
    checkpoint, max_model_len=128, hf_overrides=sizes
).create_engine_config()
if "kv_role" in changes:
    config.kv_transfer_config = KVTransferConfig(kv_connector="any", **changes)
else:
    for field, value in changes.items():
        setattr(config.parallel_config, field, value)
quant_config = config.quant_config
quant_config.ignore = ignore
names = ["q_a_proj", "kv_a_proj_with_mqa"]
quant_config.packed_modules_mapping = {"fused_qkv_a_proj": names}
layer, prefix = torch.nn.Linear(1, 1), f"model.layers.0.self_attn.{name}"
with set_current_vllm_config(config):
    from vllm_ascend.ascend_config import init_ascend_config

    init_ascend_config(config)
    args = quant_config.get_scheme_dict(layer, "model.layers.0.self_attn.q_b_proj")
    quant_config._check_latent_query(layer, prefix, args)
print("ACCEPTED")
"""
SPARSE: dict[str, Any] = {"index_topk": 64}
CONSUMER = {"kv_role": "kv_consumer"}
MIXED = ["re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$"]
RANKS = {"decode_context_parallel_size": 2}


@pytest.mark.long
@pytest.mark.parametrize(
    ("soc", "sizes", "changes", "ignore", "name", "refused"),
    [
        ("A2", SPARSE, CONSUMER, MIXED, "q_b_proj", "kv_role=kv_consumer"),
        ("A2", SPARSE, CONSUMER, MIXED, "indexer.wq_b", "kv_role=kv_consumer"),
        ("A2", SPARSE, CONSUMER, [], "q_b_proj", None),
        ("A2", SPARSE, {"kv_role": "kv_producer"}, MIXED, "q_b_proj", None),
        ("A2", SPARSE, RANKS, [], "q_b_proj", "decode_context_parallel_size=2"),
        ("A5", {}, {}, MIXED, "q_b_proj", "enable_mlapo=True"),
        ("A5", {}, {}, [], "q_b_proj", None),
        ("A2", {}, {}, MIXED, "q_b_proj", None),
        ("A5", {}, {}, MIXED, "o_proj", None),
    ],
)
def test_latent_query(
    soc: str,
    sizes: dict[str, Any],
    changes: dict[str, Any],
    ignore: list[str],
    name: str,
    refused: str | None,
) -> None:
    """vllm-ascend 0.30 treats its weight as 16-bit if another layer's is."""
    checkpoint = str(CHECKPOINTS / "dense-w4a16")
    given = json.dumps([checkpoint, sizes, changes, ignore, name])
    device = environment.Device("0.30.0rc2", soc)
    code, output = start(device, "ascend_ct", LATENT_QUERY, given)
    if refused is None:
        assert code == 0 and "ACCEPTED" in output, output[-3000:]
    else:
        assert code != 0 and "UnsupportedCheckpointError" in output, output[-3000:]
        assert f"{refused}). Supported" in output, output[-3000:]
