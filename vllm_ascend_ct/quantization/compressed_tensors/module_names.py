# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Names that modules are built with, where they are others than those in the model."""

from collections.abc import Mapping
from itertools import takewhile


def renamed_prefixes(names: Mapping[str, str]) -> dict[str, str]:
    """Where modules are built with other names than they have in the model.

    Args:
        names: That modules were built with, by those in the model.

    Returns:
        Names that the containers of some would have been built with.

    """
    prefixes = {}
    for path, name in names.items():
        parts, others = path.split("."), name.split(".")
        pairs = zip(reversed(parts), reversed(others))
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # One name alone, as `head`, may be a coincidence.
        for count in range(1, alike + 1 if alike > 1 else 0):
            prefixes[".".join(parts[:-count])] = ".".join(others[:-count])
    return prefixes


def renamed(path: str, prefixes: Mapping[str, str]) -> str:
    """The name that a module of the model would have been built with."""
    container, end = path, ""
    while container:
        container, _, last = container.rpartition(".")
        end = f"{last}.{end}" if end else last
        if container in prefixes:
            prefix = prefixes[container]
            return f"{prefix}.{end}" if prefix else end
    return path
