# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which releases are refused, and what the error recommends instead."""

import re

import pytest
import vllm
from pytest_mock import MockerFixture

from tools.docs import release_table
from vllm_ascend_ct import releases
from vllm_ascend_ct.errors import PlatformError

_FIRST = "vllm-ascend 0.23.0 or 0.23.0.post1 on vLLM 0.23.0"
_LATEST = "vllm-ascend 0.30.0rc2 on vLLM 0.30.0"


def install(
    mocker: MockerFixture, vllm_release: str, vllm_ascend: str | None = None
) -> None:
    mocker.patch.object(vllm, "__version__", vllm_release)
    installed = {"vllm-ascend": vllm_ascend, "torch_npu": "2.10.0.post4"}
    installed["compressed_tensors"] = "0.17.0"
    mocker.patch.object(releases, "version", side_effect=installed.get)


@pytest.mark.parametrize(
    ("vllm_release", "vllm_ascend"),
    [
        ("0.23.0", "0.23.0"),
        ("0.23.0+empty", "0.23.0.post1"),
        ("0.32.0", None),
        ("0.32.0+cpu", None),
        ("0.30.0", None),
        ("0.31.0", None),
        ("0.33.0", None),
        ("0.24.0+empty", "0.24.0rc1"),
        ("0.28.0+empty", "0.28.0rc1"),
        ("0.30.0+empty", "0.30.0rc2"),
    ],
)
def test_supported(
    mocker: MockerFixture, vllm_release: str, vllm_ascend: str | None
) -> None:
    install(mocker, vllm_release, vllm_ascend)
    releases.check(on_npu=vllm_ascend is not None)


@pytest.mark.parametrize(
    ("vllm_release", "vllm_ascend", "nearest"),
    [
        ("0.23.0", "0.22.1rc1", _FIRST),
        ("0.27.1", "0.27.1rc1", "vllm-ascend 0.26.0rc1 on vLLM 0.26.0"),
        ("0.24.0", "0.23.0", _FIRST),
        ("0.32.0", "0.23.0", _FIRST),
        ("0.30.0", "0.30.0", _LATEST),
        ("0.32.0", "0.32.0rc1", _LATEST),
        ("0.29.0", None, "vLLM 0.30.0"),
        ("0.34.0", None, "vLLM 0.33.0"),
        ("0.31.1.dev7+g12", None, "vLLM 0.31.0"),
        ("dev", None, "vLLM 0.30.0"),
    ],
)
def test_refused(
    mocker: MockerFixture,
    monkeypatch: pytest.MonkeyPatch,
    vllm_release: str,
    vllm_ascend: str | None,
    nearest: str,
) -> None:
    install(mocker, vllm_release, vllm_ascend)
    with pytest.raises(PlatformError) as error:
        releases.check(on_npu=vllm_ascend is not None)
    name = f"vLLM {vllm_release}"
    if vllm_ascend is not None:
        name = f"vllm-ascend {vllm_ascend} on {name}"
    assert f"does not support {name}" in str(error.value)
    assert f"Install {nearest}, or a later release" in str(error.value)
    monkeypatch.setenv("VLLM_ASCEND_CT_ANY_RELEASE", "1")
    releases.check(on_npu=vllm_ascend is not None)


def test_other_packages_are_named(
    mocker: MockerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    mocker.patch.object(vllm, "__version__", "0.30.0+empty")
    installed = {"vllm-ascend": "0.30.0rc2", "torch_npu": "2.10.0.post2"}
    installed["compressed_tensors"] = "0.17.0"
    mocker.patch.object(releases, "version", side_effect=installed.get)
    mocker.patch.object(releases.logger, "propagate", True)
    with caplog.at_level("WARNING", releases.logger.name):
        releases.check(on_npu=True)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"torch_npu 2.10.0.post2 is installed, but {_LATEST} was tested with version "
        "2.10.0.post4."
    )


@pytest.mark.parametrize("row", releases.TABLE, ids=str)
def test_table(mocker: MockerFixture, row: releases.Release) -> None:
    """Each row is accepted, or refused with its reason, for each of its releases."""
    for name in row.vllm_ascend or (None,):
        install(mocker, row.vllm, name)
        if row.tested is not releases.Tested.REFUSED:
            releases.check(on_npu=name is not None)
            continue
        with pytest.raises(PlatformError, match=re.escape(f": {row.note} (")):
            releases.check(on_npu=name is not None)


def test_table_in_the_documentation() -> None:
    """If this fails, run `python -m tools.docs.release_table`."""
    page = release_table.PAGE.read_text()
    assert release_table.with_table(page) == page
    # Otherwise there would be no table to compare.
    assert page.count(release_table.START) == page.count(release_table.END) == 1
