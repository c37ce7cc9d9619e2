# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Servers on the emulated platform that lose a rank, or cannot write their cache."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.servers import EAGER, END_SECONDS, TWO_RANKS, reads
from tools.bench.soak.server import environment, serve
from tools.soft_npu import suite

pytestmark = pytest.mark.long
SECONDS = 40


def dense() -> Path:
    """A checkpoint of a small dense model."""
    suite.prepare(["dense-w4a16"])
    return suite.checkpoint("dense-w4a16").resolve()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (signal.SIGKILL, "Worker proc VllmWorker-1 died unexpectedly"),
        (signal.SIGSTOP, r"RPC call to \w+ timed out"),
    ],
)
def test_lost_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, error: str
) -> None:
    # Long enough for the first forward on a busy machine.
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(SECONDS))
    with serve(dense(), None, tmp_path, EAGER, TWO_RANKS) as server:
        assert reads(server)
        statuses, rest = servers.answers_during(
            server, lambda: servers.send_to_rank(server, sent)
        )
        assert set(statuses) == {500}
        assert b'"code": 500' in rest
        servers.wait_without_rank(server, SECONDS + END_SECONDS)
    assert re.search(error, server.log.read_text())


@contextlib.contextmanager
def tmpfs(directory: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory, if that is permitted."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"cannot mount: {result.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("size=64k", "[Errno 28] No space left on device"),
        ("ro", "[Errno 30] Read-only file system"),
    ],
)
def test_no_room_for_the_cache(tmp_path: Path, options: str, error: str) -> None:
    """A model that is compiled is not served: vLLM's error says why.

    In one process: a worker of its own sometimes survives SIGTERM then, and vLLM waits
    for it.
    """
    code = (
        "from vllm import LLM; "
        f"LLM({str(dense())!r}, dtype='bfloat16', max_model_len=256)"
    )
    variables = environment(None, tmp_path, "ascend_ct", 1, "") | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
    }
    with tmpfs(tmp_path / "cache", options):
        result = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True
        )
    assert result.returncode == 1
    assert f"OSError: {error}" in result.stderr
