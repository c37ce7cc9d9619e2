# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The main use case: `vllm serve` and a question over HTTP."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.checkpoints import demo


@pytest.mark.long
def test_serve_and_ask(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LOG", tmp_path / "server.log")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    answer = demo.serve_and_ask(checkpoint({"Linear": "w8a8-channel-dynamic"}))
    assert len(answer.split()) > 5
    log = (tmp_path / "server.log").read_text()
    for pattern in demo.EVIDENCE.values():
        assert re.search(pattern, log)
    assert "Selected AscendInt8ScaledMMLinearKernel" in log
