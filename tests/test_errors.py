# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Errors reach the user from other processes too."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from vllm_ascend_ct.errors import (
    OperatorLimitError,
    PlatformError,
    UnsupportedCheckpointError,
    broken_checkpoint,
)

PARTS = {"where": "layer a, bits=9", "supported": "bits: 4 and 8", "remedy": "Retry"}
ERRORS = [
    OperatorLimitError("npu_quant_matmul: K=7"),
    PlatformError("No platform", **PARTS),
    UnsupportedCheckpointError("Bits", **PARTS),
    broken_checkpoint("A tensor is missing", "layer a"),
]


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_copies(error: Exception) -> None:
    error.add_note("rank 3")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.__notes__ == error.__notes__


def test_from_a_pool_of_processes() -> None:
    """A process pool unpickles the errors of its workers; so does Ray."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for error in ERRORS:
            raised = pool.submit(fail, error).exception()
            assert type(raised) is type(error) and str(raised) == str(error)
