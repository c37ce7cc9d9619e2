# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Servers on the emulated platform and on a software NPU."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.soak.memory import Process, processes, tree

LOGS = Path("build/soak")
START_SECONDS, STOP_SECONDS = 300, 60
LENGTH = 256
OPTIONS = (
    f"--max-model-len={LENGTH}",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=512",
    "--dtype=bfloat16",
    # So few that a run soon has written to each: untouched memory is not resident.
    "--num-gpu-blocks-override=64",
    "--worker-extension-cls=tools.bench.soak.worker.SoakWorker",
)
# On software NPUs, unless the device's share is given.
CACHE, UTILIZATION = "--kv-cache-memory-bytes=33554432", "--gpu-memory-utilization"
# vllm-ascend refuses to wake up with FRACTAL_NZ.
SLEEP = ("--enable-sleep-mode", '--additional-config={"weight_nz_mode": 0}')
# Experts take no adapters.
LORA_MODULES = ("q_proj", "o_proj")
LORA = ("--enable-lora", "--max-lora-rank=8", "--lora-target-modules", *LORA_MODULES)
# Names of adapters, and their slots. On CPU, vLLM gives a request without an adapter
# what is in the last slot if others of its batch have one, so that one stays empty.
ADAPTERS_ON_CPU = ("first", "second"), 3
ADAPTERS_ON_NPU = ("first",), 1


@dataclass
class Server:
    """A running server.

    Attributes:
        process: Its first process.
        port: Its port on this machine.
        checkpoint: What it serves, which is also the model's name.
        log: Its output.
        left_out: What is not tested, with the reason.

    """

    process: "subprocess.Popen[bytes]"
    port: int
    checkpoint: Path
    log: Path
    adapters: tuple[str, ...]
    left_out: dict[str, str]
    _seen: set[Process] = field(default_factory=set)

    def processes(self) -> list[Process]:
        """Its processes; remembers them."""
        found = tree(self.process.pid)
        self._seen.update(found)
        return found

    def left_behind(self) -> list[Process]:
        """Processes that are alive still."""
        alive = {(p.pid, p.start) for p in processes().values()}
        seen = {(p.pid, p.start): p for p in self._seen}
        return [process for key, process in seen.items() if key in alive]

    def stop(self) -> None:
        """End the server and wait until all of its processes have ended."""
        self.processes()
        self.process.terminate()
        self.wait(STOP_SECONDS)

    def wait(self, seconds: float) -> None:
        """Wait until all of its processes have ended.

        Raises:
            RuntimeError: Some have not; they are killed.

        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # Takes notice of the first one's end.
            if self.process.poll() is not None and not self.left_behind():
                return
            time.sleep(0.5)
        names = [process.name for process in self.kill()]
        raise RuntimeError(f"left after {seconds} s: {names}")

    def kill(self) -> list[Process]:
        """Kill what is alive of it: these processes."""
        left = self.left_behind()
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return left


class StartError(RuntimeError):
    """A server did not start.

    Args:
        log: Its output.

    """

    def __init__(self, log: Path) -> None:
        end = log.read_text(errors="replace")[-4000:]
        super().__init__(f"the server did not start: {log} ends with\n{end}")
        self.log = log


def left_out(checkpoint: Path, release: str | None, eager: bool) -> dict[str, str]:
    """What a server cannot do, with the reason."""
    found = {}
    if release is None:
        found["memory of sleep"] = "vLLM's CPU worker ignores sleep: requests only wait"
        found["seed"] = (
            "a seeded request that is computed in parts stops vLLM's engine on CPU "
            "(`CPU Generator does not use offset`)"
        )
    else:
        found["several adapters"] = "software NPUs lack the operators for them"
    if release is not None and not eager:
        found["lora"] = (
            "with graphs, vllm-ascend on software NPUs answers adapters otherwise in a "
            "batch than alone, unquantized models too"
        )
    if release is not None and release.startswith("0.23."):
        found["lora"] = "software NPUs lack the operators that 0.23's adapters need"
        found["reload"] = "vllm-ascend 0.23's worker does not reload weights"
        found["not an object"] = "vLLM 0.23 answers 500 to a body that is a JSON list"
    config = json.loads((checkpoint / "config.json").read_text())
    if "kv_lora_rank" in config:
        found["lora"] = "the adapters made here are not for latent attention"
    return found


def environment(
    release: str | None, directory: Path, plugins: str, devices: int, memory: str
) -> dict[str, str]:
    """A server's environment variables."""
    variables = dict(os.environ)
    if release is not None:
        from tools.soft_npu import environment as soft_npu

        device = soft_npu.Device(release, devices=devices, memory=memory)
        variables = soft_npu.variables(device, directory)
    else:
        variables |= {
            "VLLM_ASCEND_CT_EMULATE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PYTHONPATH": str(Path(__file__).parents[3]),
        }
    return variables | {
        "VLLM_PLUGINS": plugins,
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def serve(
    checkpoint: Path,
    release: str | None,
    directory: Path,
    *options: str,
    without: Collection[str] = (),
    plugins: str = "ascend_ct",
    devices: int = 1,
    memory: str = "1G",
) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it.

    Args:
        checkpoint: What it serves.
        release: Of vllm-ascend on a software NPU; None for the emulated platform.
        directory: For its caches. Servers with the same one share software NPUs.
        options: Of `vllm serve`.
        without: What it must not do; see `left_out`. A model that takes adapters
            ("lora") is not compiled by vLLM's CPU platform. One that sleeps ("sleep")
            has no weights in FRACTAL_NZ on software NPUs.
        plugins: `VLLM_PLUGINS`.
        devices: Number of software NPUs.
        memory: Of each software NPU.

    Raises:
        StartError: It does not start.

    """
    port = free_port()
    log = LOGS / f"{checkpoint.name}-{release or 'emulated'}-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    missing = left_out(checkpoint, release, "--enforce-eager" in options)
    missing |= dict.fromkeys(without, "as asked")
    adapters, slots = ADAPTERS_ON_NPU if release else ADAPTERS_ON_CPU
    if release is not None and not any(x.startswith(UTILIZATION) for x in options):
        options = (CACHE, *options)
    if release is not None and "sleep" not in missing:
        options = (*SLEEP, *options)
    if "lora" not in missing:
        options = (*LORA, f"--max-loras={slots}", *options)
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "serve", str(checkpoint), f"--port={port}", *OPTIONS, *options]
    with log.open("wb") as out:
        variables = environment(release, directory, plugins, devices, memory)
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out)
    server = Server(process, port, checkpoint, log, adapters, missing)
    try:
        _wait(server)
        yield server
    finally:
        server.stop()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        server.processes()
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{server.port}/health"
            with urllib.request.urlopen(url, timeout=5):
                return
        time.sleep(1)
    raise StartError(server.log)
