# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Requests over HTTP, and what became of them."""

import http.client
import json
import threading
import time
from collections import Counter
from typing import Any, NamedTuple

# A request without an answer after so long is lost.
TIMEOUT = 120
SHOWN = 20
COMPLETIONS = "/v1/completions"


class Answer(NamedTuple):
    """Status and body of an answer."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def text(self) -> str:
        return self.body.decode(errors="replace")


class Tally:
    """Counts what became of requests. Clients share it."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.events: Counter[str] = Counter()
        self.failures: list[str] = []
        self.failed = 0
        self.doing = "nothing"
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def answered(self, kind: str, status: int) -> None:
        with self._lock:
            self.statuses[kind, status] += 1

    def happened(self, event: str) -> None:
        with self._lock:
            self.events[event] += 1

    def fail(self, what: str) -> None:
        """Count what must not happen; keep the first messages, with the operation."""
        with self._lock:
            self.failed += 1
            if len(self.failures) < SHOWN:
                seconds = time.monotonic() - self._start
                self.failures.append(f"{seconds:.1f} s, {self.doing}: {what}")

    @property
    def requests(self) -> int:
        return self.statuses.total()


class Client:
    """A client of one server.

    Args:
        port: The server's port on this machine.
        tally: Counts answers.

    """

    def __init__(self, port: int, tally: Tally) -> None:
        self.port = port
        self.tally = tally

    def ask(
        self, kind: str, path: str, body: Any = None, method: str = "POST"
    ) -> Answer | None:
        """Send a request; None if it is lost.

        Args:
            kind: What it is counted as.
            path: Path of the address.
            body: JSON, or bytes to send as they are.
            method: HTTP's.

        """
        connection = self._connect()
        try:
            self._send(connection, method, path, body)
            response = connection.getresponse()
            answer = Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            self.tally.fail(f"{kind} lost: {method} {path}: {error!r}")
            return None
        finally:
            connection.close()
        self.tally.answered(kind, answer.status)
        if answer.status >= 500:
            self.tally.fail(f"{kind}: {answer.status} {answer.text()[:300]}")
        return answer

    def expect(self, kind: str, path: str, body: Any = None) -> Any:
        """Send a request that must succeed; its JSON, or None if it did not."""
        answer = self.ask(kind, path, body)
        if answer is None:
            return None
        if answer.status == 200:
            return answer.json() if answer.body.startswith((b"{", b"[")) else {}
        if answer.status < 500:  # Others are counted already.
            self.tally.fail(f"{kind}: {answer.status} {answer.text()[:300]}")
        return None

    def cut_off(self, body: dict[str, Any], events: int) -> None:
        """Start a stream, read some events and close the connection."""
        connection = self._connect()
        try:
            self._send(connection, "POST", COMPLETIONS, body | {"stream": True})
            if events:
                response = connection.getresponse()
                self.tally.answered("cut off", response.status)
                if response.status != 200:
                    self.tally.fail(f"cut off: {response.status} {response.read()!r}")
                for _ in range(2 * events):  # There is an empty line after each.
                    response.readline()
            else:
                self.tally.happened("connections closed without reading")
        except (OSError, http.client.HTTPException) as error:
            self.tally.fail(f"cut off, lost: {error!r}")
        finally:
            connection.close()

    def stream(self, body: dict[str, Any]) -> None:
        """Read a stream to its end."""
        answer = self.ask("stream", COMPLETIONS, body | {"stream": True})
        if answer is not None and answer.status == 200:
            events = [line for line in answer.body.split(b"\n\n") if line]
            if events[-1] != b"data: [DONE]":
                self.tally.fail(f"stream ended early: {events[-1][:300]!r}")
        elif answer is not None and answer.status < 500:
            self.tally.fail(f"stream: {answer.status} {answer.text()[:300]}")

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    @staticmethod
    def _send(
        connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
