# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What servers answer while something fails."""

import http.client
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.soak import canary
from tools.bench.soak.requests import COMPLETIONS, TIMEOUT, Client, Tally
from tools.bench.soak.server import Server

EAGER = "--enforce-eager"
TWO_RANKS = "--tensor-parallel-size=2"
PROMPT = list(range(1, 17))
# Until an engine that cannot go on has ended. It takes 10 on an idle machine.
END_SECONDS = 60
# So many that their requests take longer than until something fails.
TOKENS = 240
# What vLLM calls the process.
RANK = b"VLLM::Worker_TP1"


def client(server: Server) -> Client:
    return Client(server.port, Tally())


def reads(server: Server) -> canary.Reading | None:
    return canary.read(client(server), str(server.checkpoint), PROMPT)


def ask(
    server: Server, timeout: float = TIMEOUT, **options: Any
) -> http.client.HTTPConnection:
    """Send a request, and do not wait for its answer."""
    body = {"model": str(server.checkpoint), "prompt": PROMPT, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS, json.dumps(body | options), headers)
    return connection


def answers_during(server: Server, act: Callable[[], None]) -> tuple[list[int], bytes]:
    """Do something while requests are computed: statuses, and the rest of a stream."""
    waiting = [ask(server, max_tokens=TOKENS) for _ in range(3)]
    stream = ask(server, max_tokens=TOKENS, stream=True).getresponse()
    assert stream.status == 200 and stream.readline().startswith(b"data: ")
    act()
    statuses = [connection.getresponse().status for connection in waiting]
    return statuses, stream.read()


def send_to_rank(server: Server, sent: signal.Signals) -> None:
    """Send a signal to the second of two ranks."""
    titles = {p.pid: Path(f"/proc/{p.pid}/cmdline") for p in server.processes()}
    (rank,) = [pid for pid, file in titles.items() if RANK in file.read_bytes()]
    os.kill(rank, sent)


def wait_without_rank(server: Server, seconds: float) -> None:
    """Wait until a server that lost a rank has ended.

    vLLM's API server sends SIGTERM to the engine core, and kills the ranks only where
    it then still finds the core alive: ranks that cannot answer may be left.
    """
    server.process.wait(seconds)
    server.kill()
