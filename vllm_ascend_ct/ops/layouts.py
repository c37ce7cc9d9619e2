# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Named layouts that users with a chip can choose between, to compare them."""

from dataclasses import dataclass

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.ops.precedents import (
    CONTIGUOUS,
    DIVIDED,
    RECIPROCAL,
    TRANSPOSED,
)
from vllm_ascend_ct.ops.soc import Soc, current_soc

# A per-channel scale passed once, or repeated for each group of 256.
SINGLE, REPEATED = "single", "repeated"
# Activations quantized by a separate operator, or by the operator that multiplies.
SPLIT, DEQUANT = "split", "dequant"


@dataclass(frozen=True)
class Choice:
    """Layouts of one kind of linear layer.

    Attributes:
        names: Names of the layouts; the first is the default.
        chips: Chips on which the user can choose.

    """

    names: tuple[str, ...]
    chips: tuple[Soc, ...]


CHOICES = {
    "w4a16-group": Choice((CONTIGUOUS, TRANSPOSED), (Soc.A2, Soc.A3, Soc.A5)),
    "w4a8-channel": Choice((SINGLE, REPEATED), (Soc.A2, Soc.A3)),
    "w8a8-dynamic": Choice((SPLIT, DEQUANT), (Soc.ASCEND_310P,)),
    "w8a8-static": Choice((RECIPROCAL, DIVIDED), tuple(Soc)),
}


def requested() -> dict[str, str]:
    """Layouts that `VLLM_ASCEND_CT_LAYOUT` requests, by kind.

    Raises:
        PlatformError: The current chip does not offer a requested layout.

    """
    soc = current_soc()
    choices = {kind: c.names for kind, c in CHOICES.items() if soc in c.chips}
    pairs = envs.layouts()
    for kind, name in pairs.items():
        if name not in choices.get(kind, ()):
            known = (f"{kind}={'|'.join(names)}" for kind, names in choices.items())
            raise PlatformError(
                f"Unknown layout on {soc.value}",
                where=f"{envs.LAYOUT}, {kind}={name}",
                supported=", ".join(known),
                remedy=f"Correct or unset {envs.LAYOUT}",
            )
    return pairs


def chosen(kind: str) -> str:
    """The layout that kernels use for a kind: the requested one or the default."""
    return requested().get(kind, CHOICES[kind].names[0])
