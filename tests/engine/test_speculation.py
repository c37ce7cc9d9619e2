# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Speculative decoding with quantized draft models in the vLLM engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pytest_mock import MockerFixture
from vllm import LLM, SamplingParams
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from tools.bench.bench_host import kernels_of
from tools.checkpoints import drafts
from tools.checkpoints.tiny_moe import IGNORE
from tools.numerics.logprobs import (
    clean_up,
    difference_of_generated,
    of_generated,
    reference_model,
)
from tools.soft_npu.serve import PROMPTS, accepted

NEW_TOKENS = 24
INT4 = "AscendWNA16LinearKernel"
# Mean absolute difference of log-probabilities, as without speculation.
INT8_TOLERANCE, INT4_TOLERANCE = 0.03, 0.01
# Of a quantized draft model's proposals, those that the same model makes dequantized.
# Others are near ties.
ALIKE = 0.95

Make = Callable[..., Path]


class Served(NamedTuple):
    """What an engine did, and what its draft model did."""

    outputs: list[Any]
    kernels: list[str]
    proposals: list[int]
    accepted: float


def serve(mocker: MockerFixture, path: Path, dtype: str, **speculation: Any) -> Served:
    spy = mocker.spy(SpecDecodeBaseProposer, "propose")
    llm = LLM(
        str(path),
        dtype=dtype,
        max_model_len=128,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        speculative_config={"num_speculative_tokens": 2, **speculation},
    )
    greedy = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0
    )
    spy.reset_mock()
    # One at a time: what is proposed together depends on what was accepted.
    outputs = [llm.generate(prompt, greedy, use_tqdm=False)[0] for prompt in PROMPTS]
    part = accepted(llm)
    kernels = kernels_of(spy.call_args.args[0].model)
    proposals = [token for ids in spy.spy_return_list for token in ids.flatten()]
    mocker.stop(spy)
    del llm
    clean_up()
    return Served(outputs, kernels, [int(token) for token in proposals], part)


def check_right(path: Path, outputs: list[Any], tolerance: float) -> None:
    """The tokens have the log-probabilities that the model gives them in float32."""
    texts = [
        (
            list(output.prompt_token_ids),
            list(output.outputs[0].token_ids),
            of_generated(output),
        )
        for output in outputs
    ]
    assert all(len(tokens) == NEW_TOKENS for _, tokens, _ in texts)
    difference = difference_of_generated(reference_model(path), texts)
    print(f"difference: {difference:.4f}")
    assert difference < tolerance


def alike(some: list[int], others: list[int]) -> float:
    """The part of the proposals that are equal."""
    pairs = list(zip(some, others, strict=True))
    assert len(set(some)) > 10, "proposals do not vary"
    found = sum(a == b for a, b in pairs) / len(pairs)
    print(f"{len(pairs)} proposals, alike: {found:.3f}")
    return found


def test_smaller_scheme_drafts(mocker: MockerFixture, checkpoint: Make) -> None:
    """A model in W8A8 accepts most of what it proposes itself in W4A16."""
    path = checkpoint({"Linear": "w8a8-channel-dynamic"})
    draft = checkpoint({"Linear": "w4a16-g128"})
    served = serve(mocker, path, "auto", method="draft_model", model=str(draft))
    assert served.kernels == [INT4]
    check_right(path, served.outputs, INT8_TOLERANCE)
    assert served.accepted > 0.8


@pytest.mark.long
@pytest.mark.parametrize("scheme", [None, "w4a16-g128"])
def test_eagle_head(
    mocker: MockerFixture, checkpoint: Make, tmp_path: Path, scheme: str | None
) -> None:
    path, head = checkpoint({"Linear": "w8a8-channel-dynamic"}), tmp_path / "head"
    drafts.make_eagle(head, scheme)
    served = serve(mocker, path, "auto", method="eagle3", model=str(head))
    check_right(path, served.outputs, INT8_TOLERANCE)
    if scheme is None:
        assert served.kernels == []
        return
    assert served.kernels == [INT4]
    plain = tmp_path / "plain"
    drafts.dequantize(head, plain)
    expected = serve(mocker, path, "auto", method="eagle3", model=str(plain))
    assert not {*expected.kernels} & {*served.kernels}
    assert alike(served.proposals, expected.proposals) > ALIKE


def test_multi_token_prediction(
    mocker: MockerFixture,
    checkpoint: Make,
    moe_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The layer has latent attention, and shared and routed experts."""
    recipe = {"re:.*(_proj|_mqa)$": "w4a16-g128"}
    path = checkpoint(recipe, base=moe_model("deepseek-v3"), ignore=IGNORE)
    drafts.add_mtp(path)
    served = serve(mocker, path, "float16", method="mtp")
    check_right(path, served.outputs, INT4_TOLERANCE)
    assert served.kernels == ["AscendWNA16Experts", INT4]
    plain = tmp_path / "plain"
    drafts.dequantize(path, plain)
    expected = serve(mocker, plain, "float16", method="mtp")
    assert not {*expected.kernels} & {*served.kernels}
    assert alike(served.proposals, expected.proposals) > ALIKE
