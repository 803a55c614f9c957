"""Docstrings, which are written to be read as they are, as reStructuredText."""

import re
from typing import Any

_CODE = re.compile(r"`+([^`]+)`+")


def _prose(text: str) -> str:
    """`code` is literal, and nothing else is markup."""
    parts = _CODE.split(text)  # prose, code, prose, ...
    done = []
    for i, part in enumerate(parts):
        if i % 2:  # a letter may stand at it, as in `VAE`s
            before, after = (("\\ " if re.match(r"\w", side) else "") for side in (parts[i - 1][-1:], parts[i + 1][:1]))
            done.append(f"{before}``{part}``{after}")
        else:
            done.append(re.sub(r"([\\|*]|(?<=\w)_(?!\w))", r"\\\1", part))
    return "".join(done)


def from_plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Called by autodoc for each docstring, whose lines it changes; examples stay."""
    parts = re.split(r"((?:^|(?<=\n))[ ]*>>>.*?(?:\n[ ]*(?=\n)|\Z))", "\n".join(lines), flags=re.DOTALL)
    if what in ("property", "attribute"):  # napoleon would take what stands before a colon for a type
        parts = [part.replace(": ", " – ", 1) for part in parts]
    lines[:] = "".join(part if i % 2 else _prose(part) for i, part in enumerate(parts)).split("\n")
