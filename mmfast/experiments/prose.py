"""What the reports' pages have in common: the places where they stand, rows of tables, and lists within sentences."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mmfast.experiments.settings import SettingsError

BEGIN, END = "<!-- mmfast report {}: {} -->", "<!-- end of mmfast report {} -->"


def fill(path: Path, report: str, parts: Mapping[str, Callable[[], str]]) -> None:
    """Puts each part of a report between the lines of a file that ask for it, wherever there are any.

    Args:
        path: of the file.
        report: its name, as the lines have it.
        parts: what makes each part, by the name that the lines have.

    Raises:
        SettingsError: the file has no such lines.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    asked = BEGIN.format(report, f"({'|'.join(parts)})")
    pattern = re.compile(f"({asked}).*?({END.format(report)})", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}\n\n{parts[found[2]]()}\n\n{found[3]}", text)
    if not count:
        first, *others = parts
        more = f" (or: {', '.join(others)})" if others else ""
        raise SettingsError(f"{path} has no line {BEGIN.format(report, first)}{more} with {END.format(report)} after it")
    path.write_text(text)


def row(*values: object) -> str:
    """Of a table, as markdown."""
    return f"| {' | '.join(map(str, values))} |"


def listed(words: Iterable[str], joint: str = "and") -> str:
    """As a sentence has them; "" of none."""
    *head, last = [*words] or [""]
    return f"{', '.join(head)} {joint} {last}" if head else last
