# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Make a checkpoint, serve it with `vllm serve` and print an answer."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tools.checkpoints.make_checkpoint import SCHEMES, make

PROMPT = "The import statement"
LOG = Path("build/demo.log")
START_SECONDS = 600
# Patterns that must be in the server's log for the answer to count.
EVIDENCE = {
    "platform": r"Serving compressed-tensors models on EmulatedAscendCTPlatform.*",
    "emulation": r"Emulating the NPU operators.*",
    "kernel": r"(Using|Selected) Ascend\w+ for CompressedTensors\w+",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_healthy(server: "subprocess.Popen[bytes]", url: str) -> None:
    """Wait until the server answers, and show its log meanwhile.

    Args:
        server: The server's process.
        url: Its address.

    Raises:
        RuntimeError: The server ended, or did not answer in time.

    """
    start = time.monotonic()
    shown = 0.0
    while (seconds := time.monotonic() - start) < START_SECONDS:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}: see {LOG}")
        if seconds - shown > 3:
            shown = seconds
            print(f"{seconds:4.0f} s  {last_line(LOG)[:100]}", flush=True)
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"the server did not start in {START_SECONDS} s: see {LOG}")


def last_line(path: Path) -> str:
    """The last non-empty line of a file."""
    lines = path.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def complete(url: str, model: str) -> str:
    """Ask for a completion over HTTP."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


def serve_and_ask(checkpoint: Path) -> str:
    """Start `vllm serve`, ask, stop it.

    Returns:
        The completion of `PROMPT`.

    """
    port = free_port()
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "512"]
    # Compiling takes longer than the few tokens generated here.
    command += ["--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    environment["VLLM_PLUGINS"] = "ascend_ct"
    print(f"$ VLLM_PLUGINS=ascend_ct {' '.join(command)}   (log: {LOG})", flush=True)
    with LOG.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(server, url)
            return complete(url, str(checkpoint))
        finally:
            server.terminate()
            server.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", choices=SCHEMES, default="w4a16-g128")
    arguments = parser.parse_args()
    checkpoint = Path("build/checkpoints") / arguments.scheme
    make(checkpoint, {"Linear": arguments.scheme})
    answer = serve_and_ask(checkpoint)
    log = LOG.read_text()
    for name, pattern in EVIDENCE.items():
        found = list(re.finditer(pattern, log))
        if not found:
            sys.exit(f"demo: the log shows no {name}: see {LOG}")
        # The last match: one kernel may replace another.
        print(f"{name}: {found[-1].group()}")
    print(f"prompt: {PROMPT}\nanswer:{answer}")


if __name__ == "__main__":
    main()
