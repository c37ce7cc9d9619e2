# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
"""Write the texts of errors and remedies into docs/errors.md, by reading the code.

python -m tools.docs.error_page
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.docs import section
from vllm_ascend_ct import envs
from vllm_ascend_ct.errors import Remedy

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_ascend_ct"
PAGE = ROOT / "docs" / "errors.md"
START, END = "<!-- errors: tools/docs/error_page.py -->\n", "<!-- end of errors -->\n"
# A remedy's heading, and its text as it was quoted behind it.
HEADING = re.compile(r"^#### ([A-Z_]+)\n\n(?:>.*\n\n)?", re.MULTILINE)
# What raises an error, or makes one to raise, whose first argument says what is wrong.
# Where a call names no remedy it is this one.
MAKERS = {
    "PlatformError": None,
    "UnsupportedCheckpointError": None,
    "broken_checkpoint": Remedy.DOWNLOAD_AGAIN,
    "refused": Remedy.QUANTIZE_AGAIN,
    "_refused": Remedy.QUANTIZE_AGAIN,
}
WORDS = re.compile(r"\w \w|\w's")
BY_CAUSE = "by the cause"


class Text(NamedTuple):
    """An error as it is in the code, with an ellipsis for what is filled in."""

    what: str
    remedy: str
    file: str


def remedies_in(page: str) -> list[str]:
    """Names of the remedies that a page explains."""
    return [found[1] for found in HEADING.finditer(page)]


def with_texts(page: str) -> str:
    """Put the texts of now into the page's text."""
    page = HEADING.sub(lambda found: f"#### {found[1]}\n\n{_quoted(found[1])}", page)
    rows = "".join(f"| {t.what} | {t.remedy} | `{t.file}` |\n" for t in texts())
    header = "| error | remedy | raised in |\n| --- | --- | --- |\n"
    return section.replace(page, START, END, header + rows)


def _quoted(name: str) -> str:
    """A remedy's text, with what is filled in by its name; nothing if it is gone."""
    if name not in Remedy.__members__:
        return ""
    text = re.sub(r"{(\w+)}", r"*\1*", Remedy[name])
    return f"> {text}.\n\n"


def texts() -> list[Text]:
    """The errors whose text is in the code, those of the platform first."""
    found = {text for path in PACKAGE.rglob("*.py") for text in _texts_of(path)}
    return sorted(found, key=lambda text: (text.what.lower(), text.file))


def _texts_of(path: Path) -> Iterator[Text]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        maker = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        maker = node.func.id if isinstance(node.func, ast.Name) else maker
        what = _template(node.args[0])
        # Others pass on what something else says, or say where.
        is_text = what and not what.startswith("layer ") and WORDS.search(what)
        if maker in MAKERS and what and is_text:
            yield Text(what, _remedy(maker, node), str(path.relative_to(PACKAGE)))


def _template(node: ast.expr) -> str | None:
    """The text of a string, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("|", "\\|")
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or "\u2026" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        module, _, name = ast.unparse(node.value).partition(".")
        # The name of a variable.
        return getattr(envs, name) if module == "envs" and name.isupper() else None
    return None


def _remedy(maker: str, call: ast.Call) -> str:
    """What a call says to do, as the page names it."""
    given = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "remedy")]
    names = [
        part.attr
        for node in given
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and part.attr in Remedy.__members__
    ]
    if names:
        return ", ".join(map(_link, dict.fromkeys(names)))
    for keyword in call.keywords:
        if keyword.arg == "remedy":
            return _template(keyword.value) or BY_CAUSE
    default = MAKERS[maker]
    # One more than where, and than what is supported.
    is_given = len(call.args) > (3 if maker == "_refused" else 2)
    return BY_CAUSE if is_given or default is None else _link(default.name)


def _link(name: str) -> str:
    return f"[`{name}`](#{name.lower()})"


if __name__ == "__main__":
    PAGE.write_text(with_texts(PAGE.read_text()))
