# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Engines with faults: no memory, operators that fail, ranks that are lost."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.servers import EAGER, END_SECONDS, TWO_RANKS, reads
from tools.bench.soak import canary
from tools.bench.soak.operations import RPC
from tools.bench.soak.server import UTILIZATION, Server, StartError, serve
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


RELEASE = os.environ.get("SOFT_NPU_RELEASE", "")


def start(directory: Path, *options: str, **others: Any) -> Any:
    """Start a server."""
    suite.prepare(["dense-w4a16"])
    path = suite.checkpoint("dense-w4a16").resolve()
    without = ("sleep",)
    return serve(path, RELEASE, directory, EAGER, *options, without=without, **others)


def call(server: Server, method: str, *arguments: str) -> None:
    """Let the server's workers do something."""
    body = {"method": method, "args": list(arguments)}
    assert servers.client(server).expect("fault", RPC, body) is not None


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
    """The engine ends: its requests get an answer, and the log has the error.

    The server's exit status is 0: vLLM takes that for an orderly shutdown.
    """
    with start(tmp_path) as server:
        assert reads(server)
        call(server, method, *arguments)
        assert reads(server) is None
        server.wait(END_SECONDS)
    assert error in server.log.read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (signal.SIGKILL, "Worker proc VllmWorker-1 died unexpectedly"),
        # Of the other rank, which waits for this one.
        (signal.SIGSTOP, "HcclAllReduce: no answer from another rank"),
    ],
)
def test_lost_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, error: str
) -> None:
    monkeypatch.setenv("SOFT_NPU_HCCL_TIMEOUT", "20")
    with start(tmp_path, TWO_RANKS, devices=2) as server:
        assert reads(server)
        statuses, rest = servers.answers_during(
            server, lambda: servers.send_to_rank(server, sent)
        )
        assert set(statuses) == {500}
        assert b'"code": 500' in rest
        servers.wait_without_rank(server, END_SECONDS)
    assert error in server.log.read_text()


@pytest.mark.long
def test_device_does_not_answer(tmp_path: Path) -> None:
    """Nobody notices: vLLM has a timeout for separate workers only. SIGTERM works."""
    with start(tmp_path) as server:
        assert reads(server)
        call(server, "soak_fault", "hang@1")
        with pytest.raises(TimeoutError):
            servers.ask(server, timeout=20).getresponse()
        server.stop()


@pytest.mark.long
def test_two_engines_on_one_device(tmp_path: Path) -> None:
    """The second serves, or is refused by name; the first does not notice."""
    small = f"{UTILIZATION}=0.3"
    with start(tmp_path, memory="128M") as first:
        expected = reads(first)
        assert expected
        with while_reading(first, expected):
            large = start(tmp_path, f"{UTILIZATION}=0.9", memory="128M")
            with pytest.raises(StartError) as refused, large:
                pass
            with start(tmp_path, small, memory="128M") as second:
                assert reads(second) == expected
    error = "is less than desired GPU memory utilization"
    assert error in refused.value.log.read_text()


@contextlib.contextmanager
def while_reading(server: Server, expected: canary.Reading) -> Iterator[None]:
    """Compare a server's answers all the time."""
    stop = threading.Event()

    def read() -> int:
        count = 0
        while not stop.is_set():
            assert reads(server) == expected
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        counted = pool.submit(read)
        try:
            yield
        finally:
            stop.set()
        assert counted.result() > 10
