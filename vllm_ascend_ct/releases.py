# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which releases this package serves on: one table, read by all who ask."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from packaging.version import InvalidVersion, Version

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import PlatformError


@dataclass(frozen=True)
class Release:
    """Releases that serve together.

    Attributes:
        vllm: Of vLLM.
        vllm_ascend: Of vllm-ascend, oldest first; none where operators are emulated.

    """

    vllm: str
    vllm_ascend: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.vllm_ascend:
            return f"vLLM {self.vllm}"
        return f"vllm-ascend {' or '.join(self.vllm_ascend)} on vLLM {self.vllm}"


ON_NPU = (Release("0.23.0", ("0.23.0", "0.23.0.post1")),)
EMULATED = (Release("0.31.0"), Release("0.32.0"), Release("0.33.0"))


def check(on_npu: bool) -> None:
    """Refuse releases that are not in the table.

    Args:
        on_npu: Whether vllm-ascend is the base; else the operators are emulated.

    Raises:
        PlatformError: They are not, and `VLLM_ASCEND_CT_ANY_RELEASE` does not allow it.

    """
    import vllm

    installed = Release(vllm.__version__, (version("vllm-ascend"),) if on_npu else ())
    supported = ON_NPU if on_npu else EMULATED
    if any(_matches(installed, release) for release in supported):
        return
    if envs.any_release():
        # Not `warning_once`, which asks for the platform while it is being resolved.
        logging.getLogger("vllm.ascend_ct.releases").warning(
            "Nobody has tested vllm-ascend-ct on %s; tested: %s.",
            installed,
            "; ".join(map(str, supported)),
        )
        return
    raise PlatformError(
        f"This release of vllm-ascend-ct does not know {installed}",
        where=f"vLLM in {os.path.dirname(vllm.__file__)}",
        supported="; ".join(map(str, supported)),
        remedy=f"Install {_nearest(installed, supported)}, or a later release of "
        "vllm-ascend-ct, or leave ascend_ct out of VLLM_PLUGINS; "
        f"{envs.ANY_RELEASE}=1 tries it untested",
    )


def _matches(installed: Release, release: Release) -> bool:
    known = {_public(name) for name in release.vllm_ascend}
    return _public(installed.vllm) == _public(release.vllm) and (
        {_public(name) for name in installed.vllm_ascend} <= known
    )


def _public(name: str) -> Version:
    """A version without the part that tells builds apart (`+cpu`, `+empty`)."""
    try:
        return Version(Version(name).public)
    except InvalidVersion:
        # What a source tree without tags calls itself ("dev").
        return Version("0.dev0")


def _nearest(installed: Release, supported: Sequence[Release]) -> Release:
    """The last release before the one that is installed, or the first after it."""

    def key(release: Release) -> Version:
        return _public((release.vllm_ascend or (release.vllm,))[-1])

    earlier = [release for release in supported if key(release) <= key(installed)]
    return max(earlier, key=key) if earlier else min(supported, key=key)
