# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
import pytest

from tests.conftest import freeze


@pytest.fixture(autouse=True)
def frozen_again(frozen: None) -> None:
    """The engine of the test before has ended."""
    freeze()
