# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project

from pathlib import Path

import pytest

from tools.stacks import stacks


def test_what_failed_to_be_made_is_made_again(tmp_path: Path) -> None:
    """Also if the directory had been made with the same contents before."""
    directory = tmp_path / "made"

    def make(target: Path) -> None:
        (target / "file").touch()

    def fail(target: Path) -> None:
        raise OSError

    stacks.once(directory, "one", make)
    with pytest.raises(OSError):
        stacks.once(directory, "other", fail)
    assert not stacks.is_made(directory, "one")
    assert (stacks.once(directory, "one", make) / "file").exists()
