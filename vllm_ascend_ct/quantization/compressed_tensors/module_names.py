# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Modules whose prefix differs from their name in the model."""

from collections.abc import Mapping
from itertools import takewhile


def renamed_prefixes(names: Mapping[str, str]) -> dict[str, str]:
    """Derive the prefixes of containers from those of the modules in them.

    Args:
        names: Prefixes that modules were built with, by their names in the model.

    Returns:
        Prefixes of containers, by their names in the model.

    """
    prefixes = {}
    for path, name in names.items():
        parts, others = path.split("."), name.split(".")
        pairs = zip(reversed(parts), reversed(others))
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A single equal part, like `head`, may be a coincidence.
        for count in range(1, alike + 1 if alike > 1 else 0):
            prefixes[".".join(parts[:-count])] = ".".join(others[:-count])
    return prefixes


def renamed(path: str, prefixes: Mapping[str, str]) -> str:
    """The prefix that a module would have been built with.

    Args:
        path: The module's name in the model.
        prefixes: Prefixes of containers, from `renamed_prefixes`.

    """
    container, end = path, ""
    while container:
        container, _, last = container.rpartition(".")
        end = f"{last}.{end}" if end else last
        if container in prefixes:
            prefix = prefixes[container]
            return f"{prefix}.{end}" if prefix else end
    return path
