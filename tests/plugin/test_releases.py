# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Which releases are refused, and what is advised instead."""

import pytest
import vllm
from pytest_mock import MockerFixture

from vllm_ascend_ct import releases
from vllm_ascend_ct.errors import PlatformError


def install(
    mocker: MockerFixture, vllm_release: str, vllm_ascend: str | None = None
) -> None:
    mocker.patch.object(vllm, "__version__", vllm_release)
    mocker.patch.object(releases, "version", return_value=vllm_ascend)


@pytest.mark.parametrize(
    ("vllm_release", "vllm_ascend"),
    [
        ("0.23.0", "0.23.0"),
        ("0.23.0+empty", "0.23.0.post1"),
        ("0.32.0", None),
        ("0.32.0+cpu", None),
        ("0.31.0", None),
        ("0.33.0", None),
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
        ("0.23.0", "0.22.1rc1", "vllm-ascend 0.23.0 or 0.23.0.post1 on vLLM 0.23.0"),
        ("0.27.1", "0.27.1rc1", "vllm-ascend 0.23.0 or 0.23.0.post1 on vLLM 0.23.0"),
        ("0.24.0", "0.23.0", "vllm-ascend 0.23.0 or 0.23.0.post1 on vLLM 0.23.0"),
        ("0.32.0", "0.23.0", "vllm-ascend 0.23.0 or 0.23.0.post1 on vLLM 0.23.0"),
        ("0.30.0", None, "vLLM 0.31.0"),
        ("0.34.0", None, "vLLM 0.33.0"),
        ("0.31.1.dev7+g12", None, "vLLM 0.31.0"),
        ("dev", None, "vLLM 0.31.0"),
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
    assert f"does not know {name} (" in str(error.value)
    assert f"Install {nearest}, or a later release" in str(error.value)
    monkeypatch.setenv("VLLM_ASCEND_CT_ANY_RELEASE", "1")
    releases.check(on_npu=vllm_ascend is not None)
