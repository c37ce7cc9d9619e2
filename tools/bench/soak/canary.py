# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""A prompt whose answer may not change."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tools.bench.soak.requests import COMPLETIONS, Client

PROMPT, GENERATED = 48, 12
# Mean difference of log-probabilities. Requests beside the canary may change the order
# of sums, hence 16-bit roundings. On the platforms that are served here not a bit
# changed in half an hour; a scale of one layer that is 5 % off changes 30 times this.
TOLERANCE = 0.001


class Reading(NamedTuple):
    """An answer to the canary's prompt.

    Attributes:
        tokens: Greedy tokens.
        logprobs: Log-probabilities of the prompt's tokens but the first, and of these.
        margin: The smallest lead of a greedy token over the second best.

    """

    tokens: list[str]
    logprobs: list[float]
    margin: float

    def difference(self, other: "Reading") -> float:
        """Mean difference of log-probabilities."""
        pairs = list(zip(self.logprobs, other.logprobs, strict=True))
        return sum(abs(a - b) for a, b in pairs) / len(pairs)


def read(client: Client, model: str, prompt: Sequence[int]) -> Reading | None:
    """Ask the canary's prompt; None if there was no answer, which is counted."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": GENERATED,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
        # Computes the whole prompt, also if a prefix is cached.
        "prompt_logprobs": 0,
    }
    answer = client.expect("canary", COMPLETIONS, body)
    return None if answer is None else parse(answer["choices"][0], prompt)


def parse(choice: dict[str, Any], prompt: Sequence[int]) -> Reading:
    """Take what is compared from an answer."""
    logprobs = choice["logprobs"]
    leads = [sorted(top.values())[-2:] for top in logprobs["top_logprobs"]]
    of_prompt = [
        position[str(token)]["logprob"]
        for token, position in zip(prompt[1:], choice["prompt_logprobs"][1:])
    ]
    return Reading(
        logprobs["tokens"],
        of_prompt + logprobs["token_logprobs"],
        min(best - second for second, best in leads),
    )


def choose(client: Client, model: str, tokens: Sequence[int]) -> list[int]:
    """The part of a text after which greedy tokens lead most, so that none flips."""
    prompts = [list(tokens[at : at + PROMPT]) for at in range(0, 20 * PROMPT, PROMPT)]
    readings = [(read(client, model, prompt), prompt) for prompt in prompts]
    return max((r.margin, prompt) for r, prompt in readings if r is not None)[1]


def compare(
    client: Client, what: str, found: Reading | None, expected: Reading
) -> float | None:
    """Count a changed answer; returns the difference."""
    if found is None:
        return None
    difference = found.difference(expected)
    if found.tokens != expected.tokens or difference > TOLERANCE:
        client.tally.happened("canary changes")
        client.tally.fail(
            f"{what}: the canary changed by {difference:.4f}: "
            f"{''.join(found.tokens)!r}, not {''.join(expected.tokens)!r}"
        )
    return difference
