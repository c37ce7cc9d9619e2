# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The table of vLLM and vllm-ascend releases that this package supports.

`python -m tools.docs.release_table` writes it into the documentation.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import PlatformError

# Not `init_logger`: its `warning_once` needs the platform, which vLLM is still
# selecting when this module runs.
logger = logging.getLogger("vllm.ascend_ct.releases")


class Tested(StrEnum):
    """How far a release is tested."""

    END_TO_END = "end to end"
    IN_PARTS = "in parts"
    REFUSED = "refused"


@dataclass(frozen=True)
class Release:
    """Versions of packages that are used together.

    Attributes:
        vllm: vLLM version.
        vllm_ascend: vllm-ascend versions, oldest first; empty if the operators are
            emulated.
        torch_npu: torch_npu version that vllm-ascend pins.
        compressed_tensors: compressed-tensors version that vLLM pins.
        tested: How far it is tested: whole engines, single layers, or refused.
        note: What was tested, or why it is refused.

    """

    vllm: str
    vllm_ascend: tuple[str, ...] = ()
    torch_npu: str = ""
    compressed_tensors: str = "0.17.0"
    tested: Tested = Tested.REFUSED
    note: str = ""

    def __str__(self) -> str:
        if not self.vllm_ascend:
            return f"vLLM {self.vllm}"
        return f"vllm-ascend {' or '.join(self.vllm_ascend)} on vLLM {self.vllm}"


_POST4 = "2.10.0.post4"
_ENGINES = "a dense model and Qwen3-MoE on software NPUs"
TABLE = (
    Release(
        "0.23.0",
        ("0.23.0", "0.23.0.post1"),
        _POST4,
        tested=Tested.END_TO_END,
        note="engines on software NPUs; layers of all schemes",
    ),
    *(
        Release(vllm, (f"{vllm}rc1",), torch_npu, tested=Tested.IN_PARTS, note=_ENGINES)
        for vllm, torch_npu in (
            ("0.24.0", "2.10.0.post2"),
            ("0.25.1", "2.10.0.post2"),
            ("0.26.0", _POST4),
        )
    ),
    Release(
        "0.27.1",
        ("0.27.1rc1",),
        _POST4,
        note="its interface of experts, which no other release has",
    ),
    Release("0.28.0", ("0.28.0rc1",), _POST4, tested=Tested.IN_PARTS, note=_ENGINES),
    Release(
        "0.30.0",
        ("0.30.0rc2",),
        _POST4,
        tested=Tested.END_TO_END,
        note="engines on software NPUs",
    ),
    Release(
        "0.30.0",
        tested=Tested.IN_PARTS,
        note="layers, loading and engines, all tests but of what it lacks",
    ),
    Release(
        "0.31.0", tested=Tested.IN_PARTS, note="layers, loading and engines, all tests"
    ),
    Release("0.32.0", tested=Tested.END_TO_END, note="all tests"),
    Release("0.33.0", tested=Tested.IN_PARTS, note="its Python files over 0.32.0's"),
)


def served(on_npu: bool) -> list[Release]:
    """The releases that are not refused.

    Args:
        on_npu: True for releases with vllm-ascend, False for emulated operators.

    """
    return [
        release
        for release in TABLE
        if bool(release.vllm_ascend) is on_npu and release.tested is not Tested.REFUSED
    ]


def describe(releases: Sequence[Release]) -> str:
    """List releases for an error text."""
    return "; ".join(map(str, releases))


def find(on_npu: bool) -> tuple[Release, Release | None]:
    """The installed releases, and their row of the table, if there is one.

    Args:
        on_npu: Whether vllm-ascend runs the engine; otherwise operators are emulated.

    """
    import vllm

    installed = Release(vllm.__version__, (version("vllm-ascend"),) if on_npu else ())
    return installed, next((row for row in TABLE if _matches(installed, row)), None)


def check(on_npu: bool) -> None:
    """Refuse installed releases that the table does not list, or lists as refused.

    Args:
        on_npu: Whether vllm-ascend runs the engine; otherwise operators are emulated.

    Raises:
        PlatformError: The installed releases are refused, and
            `VLLM_ASCEND_CT_ANY_RELEASE` is not 1.

    """
    import vllm

    installed, found = find(on_npu)
    supported = served(on_npu)
    if found in supported:
        _compare_others(found)
        return
    if envs.any_release():
        logger.warning(
            "vllm-ascend-ct has not been tested on %s. Tested releases: %s.",
            installed,
            describe(supported),
        )
        return
    reason = "" if found is None else f": {found.note}"
    raise PlatformError(
        f"This release of vllm-ascend-ct does not support {installed}{reason}",
        where=f"vLLM in {os.path.dirname(vllm.__file__)}",
        supported=describe(supported),
        remedy=f"Install {_nearest(installed, supported)}, or a later release of "
        "vllm-ascend-ct, or leave ascend_ct out of VLLM_PLUGINS; "
        f"{envs.ANY_RELEASE}=1 skips this check",
    )


def _compare_others(release: Release) -> None:
    """Warn about other packages whose versions differ from the tested ones."""
    for package in ("torch_npu", "compressed_tensors"):
        tested = getattr(release, package)
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if tested and _public(installed) != _public(tested):
            logger.warning(
                "%s %s is installed, but %s was tested with version %s.",
                package,
                installed,
                release,
                tested,
            )


def _matches(installed: Release, release: Release) -> bool:
    ours, known = (
        {_public(name) for name in names}
        for names in (installed.vllm_ascend, release.vllm_ascend)
    )
    same = _public(installed.vllm) == _public(release.vllm)
    return same and bool(ours) == bool(known) and ours <= known


def _public(name: str) -> Version:
    """A version without its local build label (`+cpu`, `+empty`)."""
    try:
        return Version(Version(name).public)
    except InvalidVersion:
        # A source tree without tags calls itself "dev".
        return Version("0.dev0")


def _nearest(installed: Release, supported: Sequence[Release]) -> Release:
    """The latest supported release up to the installed one, else the earliest."""

    def key(release: Release) -> Version:
        return _public((release.vllm_ascend or (release.vllm,))[-1])

    earlier = [release for release in supported if key(release) <= key(installed)]
    return max(earlier, key=key) if earlier else min(supported, key=key)
