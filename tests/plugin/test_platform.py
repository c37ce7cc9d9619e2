# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The platform that vLLM selects; in fresh interpreters if vLLM decides."""

import importlib.util
import os
from importlib.machinery import ModuleSpec

import pytest
from pytest_mock import MockerFixture
from vllm.platforms import current_platform

import vllm_ascend_ct
from tests.plugin.fresh import run, run_ok
from vllm_ascend_ct.errors import PlatformError
from vllm_ascend_ct.platforms import current

PRINT_PLATFORM = """
from vllm.platforms import PlatformEnum, current_platform as p
print(type(p).__name__, p._enum is PlatformEnum.OOT, p.is_cpu(), p.is_out_of_tree(),
      p.device_name)
"""


def test_platform_of_this_plugin() -> None:
    out = run_ok(PRINT_PLATFORM, VLLM_PLUGINS="ascend_ct")
    assert out == "EmulatedAscendCTPlatform True True False cpu"


@pytest.mark.parametrize(
    ("plugins", "answers"),
    [
        (None, False),
        ("", False),
        ("ascend_c", False),
        ("ascend", False),
        ("ascend_ct", True),
        ("lora_filesystem_resolver,ascend_ct", True),
        ("ascend,ascend_ct", False),
    ],
)
def test_when_the_plugin_answers(
    monkeypatch: pytest.MonkeyPatch, plugins: str | None, answers: bool
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS")
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert (vllm_ascend_ct.platform_plugin() is not None) is answers


def install(mocker: MockerFixture, *packages: str) -> None:
    """Pretend that of torch_npu and vllm_ascend exactly `packages` are installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        if name in ("torch_npu", "vllm_ascend"):
            return ModuleSpec(name, None) if name in packages else None
        return find_spec(name, package)

    mocker.patch("importlib.util.find_spec", find)
    mocker.patch.dict("sys.modules", {name: mocker.MagicMock() for name in packages})


@pytest.mark.parametrize(
    ("emulate", "packages", "emulated"),
    [
        ("1", (), True),
        ("1", ("torch_npu", "vllm_ascend"), True),
        (None, (), True),
        ("", (), True),
        (None, ("torch_npu", "vllm_ascend"), False),
        ("0", ("torch_npu", "vllm_ascend"), False),
    ],
)
def test_choice_of_base(
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
    emulate: str | None,
    packages: tuple[str, ...],
    emulated: bool,
) -> None:
    monkeypatch.delenv("VLLM_ASCEND_CT_EMULATE")
    if emulate is not None:
        monkeypatch.setenv("VLLM_ASCEND_CT_EMULATE", emulate)
    install(mocker, *packages)
    assert current.is_emulated() is emulated


@pytest.mark.parametrize(
    ("emulate", "packages", "missing"),
    [
        (None, ("torch_npu",), "vllm_ascend"),
        ("0", ("torch_npu",), "vllm_ascend"),
        ("0", (), "torch_npu"),
    ],
)
def test_what_the_npu_base_lacks(
    monkeypatch: pytest.MonkeyPatch,
    mocker: MockerFixture,
    emulate: str | None,
    packages: tuple[str, ...],
    missing: str,
) -> None:
    monkeypatch.delenv("VLLM_ASCEND_CT_EMULATE")
    if emulate is not None:
        monkeypatch.setenv("VLLM_ASCEND_CT_EMULATE", emulate)
    install(mocker, *packages)
    with pytest.raises(PlatformError) as error:
        current.is_emulated()
    for part in (
        f"{missing} cannot be imported",
        f"VLLM_ASCEND_CT_EMULATE={emulate or 'unset'}",
        "Supported: a host with torch_npu",
        f"Install {missing} and source CANN's set_env.sh",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "VLLM_ASCEND_CT_EMULATE='yes'). Supported: 0, 1, or unset"),
        ("0", "torch_npu cannot be imported: No module named 'torch_npu'"),
    ],
)
def test_what_cannot_run_stops_vllm(value: str, message: str) -> None:
    """If the plugin function raised an error, vLLM would use its CPU platform."""
    result = run(PRINT_PLATFORM, VLLM_PLUGINS="ascend_ct", VLLM_ASCEND_CT_EMULATE=value)
    assert result.returncode != 0 and not result.stdout
    assert message in result.stderr


def test_general_plugin_refuses_another_platform() -> None:
    result = run(
        "from vllm.plugins import load_general_plugins\nload_general_plugins()",
        VLLM_PLUGINS="ascend_ct",
        VLLM_TARGET_DEVICE="cpu",
    )
    assert result.returncode != 0
    assert "vLLM runs on CpuPlatform" in result.stderr
    assert "VLLM_PLUGINS=ascend_ct, VLLM_TARGET_DEVICE=cpu" in result.stderr


def test_unknown_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_CT_SOC", "A4")
    with pytest.raises(ValueError, match="VLLM_ASCEND_CT_SOC='A4'.* A2, A3, 310P, A5"):
        current_platform.pre_register_and_update()


def test_own_variables_are_known_to_the_check_of_the_environment(
    mocker: MockerFixture,
) -> None:
    mocker.patch.dict(os.environ, {"VLLM_ASCEND_CT_SOC": "A3"}, clear=True)
    current_platform.validate_environ(hard_fail=True)
    os.environ["VLLM_ASCEND_CT_SOCK"] = "A3"
    with pytest.raises(ValueError, match="Unknown .*: VLLM_ASCEND_CT_SOCK"):
        current_platform.validate_environ(hard_fail=True)
