# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Keep `vllm serve` under load, and find what breaks or grows.

    python -m tools.bench.soak [--minutes 30] [--soft-npu RELEASE] [CHECKPOINT...]

Serves each checkpoint on the emulated platform or on a software NPU. Eight clients ask
for completions of random lengths, cut streams off, and send requests that have to be
refused. Meanwhile weights are loaded again, adapters come and go, the engine sleeps.
A canary is a prompt whose answer may not change. Fails for an answer with status 5xx, a
lost request, a wrong request that is not refused, a changed canary, memory that grows
faster than a bound, requests that the idle engine still holds, and processes that are
left behind. `--plant` breaks something, to show that it is found.
"""

import argparse
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tools.bench.soak import load
from tools.bench.soak.operations import Operations
from tools.bench.soak.report import Result, Sample, with_rows
from tools.bench.soak.requests import Client, Tally
from tools.bench.soak.server import Server, serve
from tools.checkpoints.tiny_model import held_out_text
from tools.soft_npu import suite

CLIENTS = 8
DEFAULT = "dense-w4a16"
PAGE = Path(__file__).parents[3] / "docs" / "performance.md"
SAMPLE_SECONDS, IDLE_SECONDS = 2, 60
# Of /metrics, when nobody asks.
IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
PLANTS = ("weight", "leak")


def soak(
    checkpoint: Path,
    release: str | None,
    minutes: float,
    plant: str | None = None,
    eager: bool = False,
    without: Sequence[str] = (),
    plugins: str = "ascend_ct",
) -> Result:
    """Serve a checkpoint under load for some minutes."""
    options = ["--enforce-eager"] * eager
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as state,
        serve(
            checkpoint,
            release,
            directory := Path(state),
            *options,
            without=without,
            plugins=plugins,
        ) as server,
    ):
        for name, reason in server.left_out.items():
            print(f"left out: {name}: {reason}", flush=True)
        print(f"log: {server.log}", flush=True)
        return _soak(server, release, minutes, plant, directory)


def _soak(
    server: Server,
    release: str | None,
    minutes: float,
    plant: str | None,
    directory: Path,
) -> Result:
    tally, model = Tally(), str(server.checkpoint)
    client = Client(server.port, tally)
    text = _tokens(client, model)
    operations = Operations(client, server, text, directory)
    stop = threading.Event()
    threads = [
        threading.Thread(
            target=load.run, args=(client, model, text, server.left_out, seed, stop)
        )
        for seed in range(CLIENTS)
    ]
    for target in (operations.run, operations.watch):
        threads.append(threading.Thread(target=target, args=(stop,)))
    if plant:
        fault = getattr(operations, f"plant_{plant}")
        threads.append(threading.Thread(target=fault, args=(stop,)))
    for thread in threads:
        thread.start()
    samples = _watch(server, operations, minutes)
    stop.set()
    for thread in threads:
        thread.join()
    operations.check(model)
    _check_idle(client)
    platform = f"vllm-ascend {release}" if release else "emulated"
    found = operations.differences
    return Result(server.checkpoint.name, platform, minutes, tally, samples, found)


def _watch(server: Server, operations: Operations, minutes: float) -> list[Sample]:
    """Measure memory until the time is over, or the server has ended."""
    samples: list[Sample] = []
    start = time.monotonic()
    while (minute := (time.monotonic() - start) / 60) < minutes:
        if server.process.poll() is not None:
            operations.client.tally.fail(f"the server ended: see {server.log}")
            break
        sizes: Counter[str] = Counter()
        for process in server.processes():
            sizes[process.name] += process.rss
        with operations.awake:
            device = operations.device_memory()
        samples.append(Sample(minute, dict(sizes), device))
        time.sleep(SAMPLE_SECONDS)
    return samples


def _check_idle(client: Client) -> None:
    """Check that the engine holds nothing of requests that have ended."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        answer = client.ask("metrics", "/metrics", method="GET")
        if answer is None:
            return
        found = {
            name: re.findall(rf"^vllm:{name}{{.*}} (\S+)$", answer.text(), re.MULTILINE)
            for name in IDLE
        }
        if all(x and set(map(float, x)) == {0} for x in found.values()):
            return
        if time.monotonic() > deadline:
            client.tally.fail(f"held by an idle engine: {found}")
            return
        time.sleep(1)


def _tokens(client: Client, model: str) -> Sequence[int]:
    answer = client.expect(
        "tokenize", "/tokenize", {"model": model, "prompt": held_out_text()}
    )
    tokens: list[int] = answer["tokens"]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help=f"{DEFAULT}, made")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--soft-npu", metavar="RELEASE", help="of vllm-ascend")
    parser.add_argument("--eager", action="store_true", help="without graphs")
    names = ("lora", "reload", "sleep")
    parser.add_argument("--without", action="append", choices=names, default=[])
    parser.add_argument("--plugins", default="ascend_ct", help="VLLM_PLUGINS")
    parser.add_argument("--plant", choices=PLANTS, help="a fault, to be found")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    arguments = parser.parse_args()
    results = []
    if not arguments.checkpoints:
        suite.prepare([DEFAULT])
    for checkpoint in arguments.checkpoints or [suite.checkpoint(DEFAULT)]:
        results.append(
            soak(
                checkpoint.resolve(),
                arguments.soft_npu,
                arguments.minutes,
                arguments.plant,
                arguments.eager,
                arguments.without,
                arguments.plugins,
            )
        )
        print(results[-1].text(), flush=True)
    if arguments.write:
        PAGE.write_text(with_rows(PAGE.read_text(), results))
    sys.exit(any(result.failures() for result in results))


if __name__ == "__main__":
    main()
