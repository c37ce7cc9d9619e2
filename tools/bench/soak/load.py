# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What clients ask for: lengths and options at random, streams that they cut off, and
requests that have to be refused."""

import threading
from collections.abc import Collection, Sequence
from random import Random
from typing import Any

from tools.bench.soak.requests import COMPLETIONS, Client
from tools.bench.soak.server import LENGTH

GENERATED = 40
# Mean pause of a client.
PAUSE_SECONDS = 0.2


def completion(
    random: Random, model: str, text: Sequence[int], without: Collection[str]
) -> dict[str, Any]:
    """A request with a prompt and options at random, some of them left out."""
    at, length = random.randrange(len(text) - LENGTH), random.randint(1, 200)
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(text[at : at + length]),
        "max_tokens": random.randint(1, GENERATED),
        "ignore_eos": True,
        "temperature": random.choice([0, 0.7, 1.5]),
    }
    some = {
        "n": 2,
        "seed": 7,
        "logprobs": 3,
        "top_k": 5,
        "top_p": 0.5,
        "presence_penalty": 1.0,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 3.0},
    }
    for name in random.sample(
        sorted(some.keys() - set(without)), random.choice([0, 0, 1, 2])
    ):
        body[name] = some[name]
    if body["temperature"] == 0:
        body.pop("n", None)  # vLLM refuses it.
    return body


def refused(model: str, without: Collection[str]) -> dict[str, tuple[str, Any]]:
    """Requests that are wrong, as path and body, some of them left out."""
    good = {"model": model, "prompt": "import", "max_tokens": 4}
    wrong: dict[str, dict[str, Any]] = {
        "unknown model": {"model": "nobody"},
        "long prompt": {"prompt": [5] * (LENGTH + 1)},
        "prompt and answer too long": {"prompt": [5] * LENGTH, "max_tokens": 50},
        "negative max_tokens": {"max_tokens": -1},
        "max_tokens of text": {"max_tokens": "many"},
        "negative temperature": {"temperature": -1},
        "n of zero": {"n": 0},
        "top_p above 1": {"top_p": 1.5},
        "many logprobs": {"logprobs": 100_000},
        "token outside of the vocabulary": {"prompt": [10**6]},
        "negative token": {"prompt": [-5]},
        "empty prompt": {"prompt": []},
        "unknown bias": {"logit_bias": {"999999": 1.0}},
        "stream options without a stream": {"stream_options": {"include_usage": True}},
    }
    bodies: dict[str, tuple[str, Any]] = {
        name: (COMPLETIONS, good | changes) for name, changes in wrong.items()
    }
    bodies |= {
        "bad JSON": (COMPLETIONS, b'{"model": '),
        "not an object": (COMPLETIONS, b"[1, 2]"),
        "not UTF-8": (COMPLETIONS, b'{"model": "\xff\xfe"}'),
        "no prompt": (COMPLETIONS, {"model": model}),
        "unknown path": ("/v1/nothing", {}),
        "chat without a template": (
            "/v1/chat/completions",
            {"model": model, "messages": [{"role": "user", "content": "import"}]},
        ),
        "no messages": ("/v1/chat/completions", {"model": model, "messages": []}),
    }
    if "lora" not in without:
        bodies |= _REFUSED_ADAPTERS
    return {name: bodies[name] for name in bodies if name not in without}


_REFUSED_ADAPTERS: dict[str, tuple[str, Any]] = {
    "unknown adapter": ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    "adapter without a file": (
        "/v1/load_lora_adapter",
        {"lora_name": "none", "lora_path": "/nowhere"},
    ),
}


def run(
    client: Client,
    model: str,
    text: Sequence[int],
    without: Collection[str],
    seed: int,
    stop: threading.Event,
) -> None:
    """Ask one request after the other until `stop` is set."""
    random = Random(seed)  # noqa: S311
    wrong = refused(model, without)
    while not stop.wait(random.expovariate(1 / PAUSE_SECONDS)):
        body = completion(random, model, text, without)
        kind = random.random()
        if kind < 0.55:
            answer = client.expect("completion", COMPLETIONS, body)
            if answer is not None:
                check(client, body, answer)
        elif kind < 0.7:
            client.stream(body)
        elif kind < 0.8:
            client.cut_off(body | {"max_tokens": GENERATED}, random.randint(0, 8))
        else:
            name = random.choice(sorted(wrong))
            path, given = wrong[name]
            answer = client.ask("wrong", path, given)
            if answer is not None and answer.status < 400:
                client.tally.fail(f"{name}: {answer.status} {answer.text()[:300]}")


def check(client: Client, body: dict[str, Any], answer: dict[str, Any]) -> None:
    """Count an answer that is not complete."""
    choices = answer["choices"]
    wanted = body.get("n", 1), body["max_tokens"] * body.get("n", 1)
    got = len(choices), answer["usage"]["completion_tokens"]
    reasons = {choice["finish_reason"] for choice in choices}
    if got != wanted or reasons != {"length"}:
        client.tally.fail(f"{got} of {wanted} choices and tokens, ended by {reasons}")
