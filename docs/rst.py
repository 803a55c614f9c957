"""Docstrings, which are written to be read as they are, as reStructuredText."""

import re
from typing import Any

_CODE = re.compile(r"`+([^`]+)`+")


def _line(text: str) -> str:
    """One line of prose: `code` is literal, and nothing else is markup."""
    parts = _CODE.split(text)  # prose, code, prose, ...
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([\\|*]|(?<=\w)_(?!\w))", r"\\\1", part) for i, part in enumerate(parts))


def from_plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Called by autodoc for each docstring, whose lines it changes."""
    example = False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            lines[i] = _line(line)
