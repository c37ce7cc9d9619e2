# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""How far each scheme is tested on each chip, as the tests' own parameters say.

`tools.docs.support_matrix` writes it into the documentation. Nothing is listed by hand
but which tests compare results: a scheme that leaves one of them leaves the tables as
well.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from tests.layers import (
    test_experts,
    test_float8,
    test_float_experts,
    test_linear,
    test_resolved,
)
from tests.real_stack import test_vllm_ascend_chips
from tests.soft_npu import (
    engines,
    test_310p,
    test_a5,
    test_engine,
    test_models,
    test_ranks,
    test_serve,
)
from tools.soft_npu import suite
from tools.soft_npu.environment import Device
from tools.stacks import real_stack
from vllm_ascend_ct.ops.limits import LIMITS


class Evidence(IntEnum):
    """How far, the least first."""

    UNTESTED = 0
    EMULATED = 1
    SOFTWARE_NPU = 2
    CHIP = 3

    def __str__(self) -> str:
        text = self.name.lower().replace("_", " ")
        return "software NPU" if self is Evidence.SOFTWARE_NPU else text


class Case(NamedTuple):
    """What a test serves: a scheme of `tools.checkpoints.make_checkpoint` on a chip."""

    chip: str
    scheme: str
    experts: bool


# Reports of `vllm-ascend-ct check-npu` and of served models. There is none yet.
ON_CHIPS: frozenset[Case] = frozenset()

# Tests that compare layers on emulated operators with a formula in float64, and the
# chips whose limits they set; None where that is a parameter as well.
_A2 = (Device.soc,)
_LINEAR: tuple[tuple[Callable[..., None], Sequence[str] | None], ...] = (
    (test_linear.test_output_is_the_formula, _A2),
    (test_linear.test_other_chips, None),
    (test_float8.test_output_is_the_formula, ("A5",)),
    (test_resolved.test_output_is_the_formula, _A2),
    (test_resolved.test_other_chips, None),
)
_EXPERTS: tuple[tuple[Callable[..., None], Sequence[str] | None], ...] = (
    (test_experts.test_output_is_the_formula, _A2),
    (test_experts.test_chip_that_quantizes_in_the_product, ("310P",)),
    (test_experts.test_chip_without_fused_gate, ("A5",)),
    (test_float_experts.test_output_is_the_formula, ("A5",)),
    # Over vllm-ascend's Python code.
    (test_vllm_ascend_chips.test_experts, (*_A2, *real_stack.OTHER_CHIPS)),
    (test_resolved.test_experts_are_the_formula, _A2),
    (test_resolved.test_experts_on_other_chips, None),
)


def collect() -> dict[Case, Evidence]:
    """The most that is known of each; what is missing is untested."""
    found: dict[Case, Evidence] = defaultdict(lambda: Evidence.UNTESTED)
    for evidence, cases in (
        (Evidence.EMULATED, _emulated()),
        (Evidence.SOFTWARE_NPU, _on_software_npus()),
        (Evidence.CHIP, ON_CHIPS),
    ):
        for case in cases:
            found[case] = max(found[case], evidence)
    return found


def _emulated() -> Iterator[Case]:
    """Emulated operators tell chips apart by their limits alone."""
    for tests, experts in ((_LINEAR, False), (_EXPERTS, True)):
        for test, chips in tests:
            for chip in chips or _parameters(test, "soc"):
                for alike in _with_limits_of(chip):
                    for scheme in _parameters(test, "scheme"):
                        yield Case(alike, scheme, experts)


def _with_limits_of(chip: str) -> list[str]:
    limits = {soc.value: limits for soc, limits in LIMITS.items()}
    return [name for name in limits if limits[name] == limits[chip]]


def _parameters(test: Callable[..., None], name: str) -> list[Any]:
    """The values that pytest gives a parameter of a test."""
    for mark in getattr(test, "pytestmark", ()):
        if mark.name != "parametrize":
            continue
        names, cases = mark.args
        if isinstance(names, str):
            names, cases = (names,), [[case] for case in cases]
        if name in names:
            return [case[names.index(name)] for case in cases]
    raise LookupError(f"{test.__name__} has no parameter {name}")


def _on_software_npus() -> Iterator[Case]:
    """What vllm-ascend's engine serves there, with the right log-probabilities."""
    for chip, name in _checkpoints():
        contents = suite.contents(name)
        attention, *others = contents.partition("/")[2].split("+")
        rest = others[-1] if others else attention
        yield Case(chip, attention, False)
        yield Case(chip, rest, engines.is_moe(name))


def _checkpoints() -> Iterator[tuple[str, str]]:
    """Chip and checkpoint of each engine."""
    for runs in test_engine.PROCESSES.values():
        yield from ((Device.soc, run["checkpoint"]) for run in runs)
    for run in test_310p.RUNS.values():
        yield test_310p.CHIP, run["checkpoint"]
    for names in test_models.PROCESSES.values():
        yield from ((Device.soc, name) for name in names)
    for runs in test_a5.PROCESSES.values():
        yield from ((test_a5.CHIP, run["checkpoint"]) for run in runs)
    for chip, run, _ in test_ranks.CASES.values():
        yield chip, run["checkpoint"]
    for name, _ in test_serve.CASES.values():
        yield Device.soc, name
