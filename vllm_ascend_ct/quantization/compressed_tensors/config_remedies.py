# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Remedies for a config that does not agree with the checkpoint's files."""

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
    """The remedy if a layer is quantized in the files but not by the config.

    Args:
        name: The layer's name in vLLM.
        layer: The layer's tensors in the files.
        ignore: `ignore` of the config.
        headers: Headers of the whole checkpoint.

    """
    if entries := [entry for entry in ignore if _matches(entry, name)]:
        patterns = quoted(entries)
        return Remedy.REMOVE_FROM_IGNORE.format(patterns=patterns, layer=name)
    pattern = quoted([pattern_of(name, layer, headers)])
    return Remedy.ADD_TO_TARGETS.format(patterns=pattern)


def pattern_of(name: str, layer: FileLayer, headers: CheckpointHeaders) -> str:
    """An entry for `ignore` or `targets` that matches a layer and similar ones.

    It matches other layers, in the same module or with a similar name, only if all of
    them are quantized like the layer or, like the layer, not quantized. It contains no
    backslashes, which would have to be escaped in JSON.

    Args:
        name: The layer's name in vLLM.
        layer: The layer's tensors in the files.
        headers: Headers of the whole checkpoint.

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
    """A short list of patterns that match all given layers.

    Args:
        layers: The layers' tensors in the files, by their names in vLLM.
        headers: Headers of the whole checkpoint.

    """
    patterns: list[str] = []
    for name, layer in layers.items():
        # Searching for a pattern is slow if there are thousands of experts.
        if not any(_matches(pattern, name) for pattern in patterns):
            patterns.append(pattern_of(name, layer, headers))
    return patterns


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), name) is not None
    return entry == name


def quoted(patterns: Iterable[str]) -> str:
    """Quote patterns for a remedy; only the first few."""
    given = [f"`{pattern}`" for pattern in patterns]
    more = ", ..." if len(given) > _EXAMPLES else ""
    return ", ".join(given[:_EXAMPLES]) + more
