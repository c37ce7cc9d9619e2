# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What happens to an engine under load: reload, adapters, sleep, planted faults."""

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.bench.soak import canary
from tools.bench.soak.canary import Reading
from tools.bench.soak.requests import Client
from tools.bench.soak.server import LORA_MODULES, Server
from tools.checkpoints import adapter

PAUSE_SECONDS, SLEEP_SECONDS = 8, 1
RPC = "/collective_rpc"
# KiB a second.
LEAK = 128


class Operations:
    """Changes an engine, and knows what it has to answer.

    Args:
        client: Its requests are counted.
        server: The server, without load yet.
        text: Tokens to take the canary's prompt from.
        directory: Where adapters and broken checkpoints are made.

    Attributes:
        differences: Of the canary's answers, until now.
        awake: Held while the engine is asleep, when memory says nothing of leaks.

    """

    def __init__(
        self, client: Client, server: Server, text: Sequence[int], directory: Path
    ) -> None:
        self.client, self.server, self.directory = client, server, directory
        self.model = str(server.checkpoint)
        self.differences: list[float] = []
        self.awake = threading.Lock()
        self.prompt = canary.choose(client, self.model, text)
        self.expected = {self.model: self._must_read(self.model)}
        self.kinds: list[Callable[[], None]] = []
        if "reload" not in server.left_out:
            self.kinds.append(self.reload)
        if "lora" not in server.left_out:
            for name in self.server.adapters:
                self._make_adapter(name)
            self.kinds.append(self.use_adapters)
        if "sleep" not in server.left_out:
            self.kinds.append(self.sleep)

    def run(self, stop: threading.Event) -> None:
        """Do one after the other until `stop` is set."""
        for kind in itertools.cycle(self.kinds or [lambda: None]):
            if stop.wait(PAUSE_SECONDS):
                return
            self.client.tally.happened(kind.__name__)
            self.client.tally.doing = kind.__name__
            kind()
            self.client.tally.doing = f"after {kind.__name__}"

    def watch(self, stop: threading.Event) -> None:
        """Ask the canary until `stop` is set."""
        while not stop.wait(1):
            self.check(self.model)

    def check(self, model: str) -> None:
        """Compare the canary's answer."""
        found = canary.read(self.client, model, self.prompt)
        expected = self.expected[model]
        difference = canary.compare(self.client, model, found, expected)
        if difference is not None:
            self.differences.append(difference)

    def reload(self) -> None:
        """Load the weights again."""
        self.client.expect("reload", RPC, {"method": "reload_weights"})

    def use_adapters(self) -> None:
        """Load all, ask each, and unload them."""
        for name in self.server.adapters:
            self._load(name)
        for name in self.server.adapters:
            self.check(name)
        for name in self.server.adapters:
            self._unload(name)

    def sleep(self) -> None:
        """Let requests wait without the device's memory, and go on."""
        with self.awake:
            before = self.device_memory()
            self.client.expect("sleep", "/sleep?level=1&mode=keep")
            threading.Event().wait(SLEEP_SECONDS)
            answer = self.client.ask("sleep", "/is_sleeping", method="GET")
            if answer is None or answer.json() != {"is_sleeping": True}:
                self.client.tally.fail(f"not asleep: {answer}")
            asleep = self.device_memory()
            if before and asleep and asleep[0] > before[0] / 2:
                self.client.tally.fail(f"device memory, asleep: {asleep} of {before}")
            self.client.expect("sleep", "/wake_up")

    def device_memory(self) -> list[int]:
        """See `SoakWorker.soak_device_memory`."""
        answer = self.client.expect("memory", RPC, {"method": "soak_device_memory"})
        found: list[int] = answer["results"][0] if answer else []
        return found

    def plant_weight(self, _: threading.Event) -> None:
        """Load a checkpoint with scales of one layer that are 5 % off."""
        from safetensors.torch import load_file, save_file

        broken = self.directory / "broken"
        shutil.copytree(self.server.checkpoint, broken)
        tensors = load_file(broken / "model.safetensors")
        name = next(
            name for name in sorted(tensors) if name.endswith("o_proj.weight_scale")
        )
        tensors[name] *= 1.05
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(broken)}}
        self.client.expect("plant", RPC, body)

    def plant_leak(self, stop: threading.Event) -> None:
        """Keep more memory each second."""
        while not stop.wait(1):
            body = {"method": "soak_leak", "args": [str(LEAK)]}
            self.client.expect("plant", RPC, body)

    def _make_adapter(self, name: str) -> None:
        """Make an adapter, and learn what it answers while nobody else asks."""
        config = json.loads((self.server.checkpoint / "config.json").read_text())
        adapter.make(self.directory / name, config, LORA_MODULES)
        self._load(name)
        self.expected[name] = self._must_read(name)
        self._unload(name)
        known = list(self.expected.values())
        if known[-1].difference(known[0]) < 5 * canary.TOLERANCE:
            raise RuntimeError(f"the adapter {name} changes nothing")

    def _load(self, name: str) -> None:
        body = {"lora_name": name, "lora_path": str(self.directory / name)}
        self.client.expect("adapter", "/v1/load_lora_adapter", body)

    def _unload(self, name: str) -> None:
        body = {"lora_name": name}
        self.client.expect("adapter", "/v1/unload_lora_adapter", body)

    def _must_read(self, model: str) -> Reading:
        found = canary.read(self.client, model, self.prompt)
        if found is None:
            raise RuntimeError(f"no answer: {self.client.tally.failures}")
        return found
