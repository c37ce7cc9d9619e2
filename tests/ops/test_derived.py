# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""What the emulation caches of weights: how much, and for how long."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.calls import CALLS, weight_quant_call
from vllm_ascend_ct import envs
from vllm_ascend_ct.ops.emulated.derived import derived

KEPT = 128 * 48 * 2


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    derived.clear()
    yield
    derived.clear()


def set_bound(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setenv(envs.EMULATE_KEEP_GIB, str(nbytes / 2**30))
    assert envs.emulate_keep_bytes() == nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_take_two_bytes_a_value(dtype: torch.dtype) -> None:
    call = weight_quant_call(dtype)
    call.run()
    assert (len(derived), derived.nbytes) == (1, KEPT)


def test_what_has_no_room_is_computed_at_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = [weight_quant_call() for _ in range(3)]
    expected = [call.run() for call in calls]
    assert derived.nbytes == 3 * KEPT
    derived.clear()
    set_bound(monkeypatch, 2 * KEPT)
    for _ in range(2):
        for call, result in zip(calls, expected):
            assert torch.equal(call.run(), result)
            assert derived.nbytes <= 2 * KEPT
    assert len(derived) == 2
    # Freeing a weight makes room for the next.
    del calls[0]
    assert torch.equal(calls[1].run(), expected[2])
    assert len(derived) == 2


@pytest.mark.parametrize("name", [name for name in CALLS if "matmul" in name])
def test_results_are_the_same_with_nothing_kept(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call = CALLS[name]()

    def run() -> torch.Tensor:
        result = call.run()
        value: torch.Tensor = result if torch.is_tensor(result) else result[0]
        return value

    kept = run()
    derived.clear()
    set_bound(monkeypatch, 0)
    assert torch.equal(run(), kept)
    assert (len(derived), derived.nbytes) == (0, 0)


def test_the_bound_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(envs.EMULATE_KEEP_GIB, raising=False)
    assert envs.emulate_keep_bytes() == 4 * 2**30


@pytest.mark.parametrize("value", ["many", "nan", "inf"])
def test_no_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(envs.EMULATE_KEEP_GIB, value)
    with pytest.raises(ValueError, match="KEEP_GIB='.*Supported: a number of GiB"):
        weight_quant_call().run()
