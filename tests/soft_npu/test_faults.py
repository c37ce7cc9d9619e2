# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Engines with faults: no memory, and operators that fail."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.bench.soak import canary
from tools.bench.soak.requests import Client, Tally
from tools.bench.soak.server import Server, serve
from tools.soft_npu import suite
from vllm_ascend_ct.errors import Remedy

pytestmark = pytest.mark.soft_npu
# Takes the device's memory when the weights of a layer are loaded, or laid out.
SCRIPT = """
import sys
import torch
import torch_npu
from vllm import LLM
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

checkpoint, phase, name = sys.argv[1:]
kept = []

def take():
    torch.ops.soft_npu.set_faults("allocate@1+")
    # Also what torch has taken from the device and not used.
    for size in (1 << 20, 1 << 16, 1 << 12, 1 << 9):
        try:
            while True:
                kept.append(torch.empty(size, dtype=torch.int8, device="npu"))
        except torch.OutOfMemoryError:
            pass

@register_model_loader("auto")
class Loader(DefaultModelLoader):
    def load_weights(self, model, *args, **options):
        if phase == "load":
            take()
        super().load_weights(model, *args, **options)
        method = next(
            module.quant_method
            for path, module in model.named_modules()
            if path.startswith(name) and getattr(module, "quant_method", None)
        )
        lay_out = method.process_weights_after_loading

        def process(layer):
            take()
            lay_out(layer)

        method.process_weights_after_loading = process

LLM(checkpoint, max_model_len=64, max_num_seqs=4, dtype="bfloat16", enforce_eager=True)
"""
SECONDS = 120
FLOAT_EXPERTS = "qwen3-moe/fp8-channel-dynamic"


@pytest.mark.parametrize(
    ("name", "phase", "layer"),
    [
        ("dense-w4a16", "lay out", "model.layers.0.self_attn.qkv_proj"),
        ("moe-w4a16", "lay out", "model.layers.0.mlp.experts"),
        pytest.param(
            "moe-w8a8", "lay out", "model.layers.0.mlp.experts", marks=pytest.mark.long
        ),
        pytest.param(
            FLOAT_EXPERTS, "load", "model.layers.0.mlp.experts", marks=pytest.mark.long
        ),
        pytest.param(
            "mla-w4a16",
            "lay out",
            "model.layers.0.self_attn.kv_b_proj",
            marks=pytest.mark.long,
        ),
    ],
)
def test_no_memory_while_loading(
    tmp_path: Path, name: str, phase: str, layer: str
) -> None:
    suite.prepare([name])
    variables = os.environ | {
        "VLLM_PLUGINS": "ascend_ct",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(suite.checkpoint(name)), phase, layer],
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 1
    (error, *_) = [
        line
        for line in reversed(result.stderr.splitlines())
        if "Error: " in line and "out of memory" in line
    ]
    assert "PlatformError: " in error and Remedy.FREE_MEMORY in error, error
    assert f"(layer {layer}" in error


EAGER = "--enforce-eager"
RELEASE = os.environ.get("SOFT_NPU_RELEASE", "")
PROMPT = list(range(1, 17))
# Until an engine that cannot go on has ended.
END_SECONDS = 60


def start(tmp_path: Path) -> Any:
    """Start a server."""
    suite.prepare(["dense-w4a16"])
    path = suite.checkpoint("dense-w4a16").resolve()
    return serve(path, RELEASE, tmp_path, EAGER)


def client(server: Server) -> Client:
    return Client(server.port, Tally())


def call(server: Server, method: str, *arguments: str) -> None:
    """Let the server's workers do something."""
    body = {"method": method, "args": list(arguments)}
    assert client(server).expect("fault", "/collective_rpc", body) is not None


def reads(server: Server) -> canary.Reading | None:
    return canary.read(client(server), str(server.checkpoint), PROMPT)


def check_ends(server: Server) -> None:
    """Check that the server ends by itself, and that nothing of it is left.

    Its exit status is 0: vLLM takes that for an orderly shutdown.
    """
    deadline = time.monotonic() + END_SECONDS
    while server.process.poll() is None or server.left_behind():
        assert time.monotonic() < deadline, server.left_behind()
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "arguments", "error"),
    [
        (
            "soak_fault",
            ["operator:npu::npu_weight_quant_batchmatmul@1"],
            "npu_weight_quant_batchmatmul: the kernel failed",
        ),
        ("soak_exhaust", [], "NPU out of memory"),
    ],
    ids=["operator", "memory"],
)
def test_fault_while_serving(
    tmp_path: Path, method: str, arguments: list[str], error: str
) -> None:
    """The engine ends: its requests get an answer, and the log has the error."""
    with start(tmp_path) as server:
        assert reads(server)
        server.processes()
        call(server, method, *arguments)
        assert reads(server) is None
        check_ends(server)
    assert error in server.log.read_text()
