# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""`vllm serve` on software NPUs, over HTTP."""

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.network_utils import get_open_port

from tests.soft_npu import engines
from tools.numerics.logprobs import held_out_tokens
from tools.soft_npu import suite
from tools.soft_npu.serve import LENGTH, NEW_TOKENS, PROMPTS

pytestmark = [pytest.mark.soft_npu, pytest.mark.long]
OPTIONS = [
    "--max-model-len=256",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=512",
    "--dtype=bfloat16",
    "--kv-cache-memory-bytes=33554432",
    "--enforce-eager",
]
WAIT = 300
CASES = {
    "one": ("dense-w4a16", []),
    "data parallel": ("dense-w8a8", ["--data-parallel-size=2"]),
    "experts on both": (
        "moe-w4a16",
        ["--data-parallel-size=2", "--enable-expert-parallel"],
    ),
}


@contextmanager
def server(name: str, options: list[str], log: Path) -> Iterator[str]:
    """Start a server for a checkpoint; returns its address."""
    suite.prepare([name])
    port = get_open_port()
    command = ["vllm", "serve", str(suite.checkpoint(name)), f"--port={port}"]
    variables = os.environ | {
        "VLLM_PLUGINS": "ascend_ct",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CACHE_ROOT": str(log.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *OPTIONS, *options],
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WAIT
        while not is_up(address):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health") as response:
            return bool(response.status == 200)
    except OSError:
        return False


def complete(address: str, **request: Any) -> list[dict[str, Any]]:
    """Choices of a completion."""
    body = {"temperature": 0, "ignore_eos": True, **request}
    given = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(given, timeout=WAIT) as response:
        choices: list[dict[str, Any]] = json.load(response)["choices"]
    return choices


@pytest.mark.parametrize("name", CASES)
def test_answers(tmp_path: Path, name: str) -> None:
    checkpoint, options = CASES[name]
    log = tmp_path / "log"
    tokens = held_out_tokens(suite.checkpoint(checkpoint))[:LENGTH]
    with server(checkpoint, options, log) as address:
        # Several requests at once, so that each engine gets some.
        choices = complete(address, prompt=PROMPTS, max_tokens=NEW_TOKENS)
        (choice,) = complete(address, prompt=tokens, max_tokens=1, prompt_logprobs=0)
    assert len(choices) == len(PROMPTS) and all(each["text"] for each in choices)
    logprobs = [
        of_position[str(token)]["logprob"]
        for token, of_position in zip(tokens[1:], choice["prompt_logprobs"][1:])
    ]
    assert engines.difference(checkpoint, logprobs) < engines.tolerance(checkpoint)
