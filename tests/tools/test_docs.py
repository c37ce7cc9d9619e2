# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""The documentation says what the code does, and its links lead somewhere.

`mkdocs build --strict` checks the links within docs/; these are the files around it.
"""

import re
from pathlib import Path

import pytest

from tools.docs import error_page
from vllm_ascend_ct.envs import ENVIRONMENT_VARIABLES
from vllm_ascend_ct.errors import Remedy
from vllm_ascend_ct.ops.layouts import CHOICES

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
FILES += ("upstream_patches/README.md",)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of headings, as GitHub and mkdocs make them."""
    text = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target, anchor in LINK.findall(FENCE.sub("", path.read_text())):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def test_errors_are_those_of_the_code() -> None:
    """If they are not: python -m tools.docs.error_page."""
    page = error_page.PAGE.read_text()
    assert error_page.with_texts(page) == page
    # Or there would be none to compare.
    assert page.count(error_page.START) == page.count(error_page.END) == 1
    assert len(error_page.texts()) > 40


def test_each_remedy_is_explained() -> None:
    """Under a heading of its name, by more than its own text."""
    page = error_page.PAGE.read_text()
    assert sorted(error_page.remedies_in(page)) == sorted(Remedy.__members__)
    _, *parts = error_page.HEADING.split(page)
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        assert rest.startswith("*When:* "), name


def test_each_setting_is_explained() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    for name in ENVIRONMENT_VARIABLES:
        assert f"\n| `{name}` |" in page, name
    for kind, choice in CHOICES.items():
        names = ", ".join(f"`{name}`" for name in choice.names)
        assert f"\n| `{kind}` | {names} |" in page, kind


def test_each_page_is_in_the_navigation() -> None:
    """As mkdocs warns too; pages that are generated have to be there."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in navigation, path.name
