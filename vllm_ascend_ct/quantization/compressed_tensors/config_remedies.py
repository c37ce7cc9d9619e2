# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What to change in a config that does not agree with the checkpoint's file."""

import re
from collections.abc import Iterable, Mapping, Sequence

from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.quantization.compressed_tensors.headers import (
    CheckpointHeaders,
    FileLayer,
)

_EXAMPLES = 4


def naming(
    name: str, layer: FileLayer, ignore: Sequence[str], headers: CheckpointHeaders
) -> str:
    """How to have the config quantize a layer."""
    if entries := [entry for entry in ignore if _matches(entry, name)]:
        patterns = quoted(entries)
        return Remedy.REMOVE_FROM_IGNORE.format(patterns=patterns, layer=name)
    pattern = quoted([pattern_of(name, layer, headers)])
    return Remedy.ADD_TO_TARGETS.format(patterns=pattern)


def pattern_of(name: str, layer: FileLayer, headers: CheckpointHeaders) -> str:
    """What in `ignore` or `targets` matches a layer, and others around it or like it.

    Those only if they are all quantized like it, or all not. A pattern without
    backslashes, so that JSON takes it.

    Args:
        name: As vLLM calls the layer.
        layer: As the file has it.
        headers: Of the whole checkpoint.

    """
    *path, last = name.split(".")
    words = [part for part in path if not part.isdigit()]
    patterns = [f".*{word}[.].*" for word in words]
    patterns.append(f".*{'.'.join([*words[-1:], last])}$")
    patterns += [
        f".*{'.'.join(path[:length])}[.].*" for length in range(1, len(path) + 1)
    ]
    for pattern in patterns:
        matched = list(headers.matching(pattern))
        if len(matched) > 1 and all(map(layer.is_like, matched)):
            return f"re:{pattern}"
    return f"re:.*{name}$"


def patterns_of(
    layers: Mapping[str, FileLayer], headers: CheckpointHeaders
) -> list[str]:
    """As few patterns as match all of some layers, by their names in vLLM."""
    patterns: list[str] = []
    for name, layer in layers.items():
        # To look for one takes long where there are thousands of experts.
        if not any(_matches(pattern, name) for pattern in patterns):
            patterns.append(pattern_of(name, layer, headers))
    return patterns


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), name) is not None
    return entry == name


def quoted(patterns: Iterable[str]) -> str:
    """Patterns as a remedy names them, the first few."""
    given = [f"`{pattern}`" for pattern in patterns]
    more = ", ..." if len(given) > _EXAMPLES else ""
    return ", ".join(given[:_EXAMPLES]) + more
