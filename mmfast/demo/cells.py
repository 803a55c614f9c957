"""The cells of a CSV file: its bytes, encoding, delimiter, and whether its first line names the columns."""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from pathlib import Path

from mmfast.data.table import DataError

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
DELIMITERS = ",;\t|"
_COMMA = r"[+-]?(\d{1,3}(\.\d{3})+|\d*),\d+([eE][+-]?\d+)?"  # a number with a decimal comma
MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # how files in other encodings than UTF-8 begin


def read_cells(path: Path, encoding: str, header: bool | None) -> tuple[list[str], list[list[str]], list[int], bool]:
    """Names of the columns, the cells, the line each row ends on, and whether the first line was the names'.

    Raises:
        DataError: naming the line where something is wrong, and what to do about it.
    """
    text = _text(path, encoding)
    first = next((line for line in text.splitlines() if line.strip()), None)
    if first is None:
        raise DataError(f"{path.name} is empty")
    outside_quotes = re.sub(r'"[^"]*"', "", first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=outside_quotes.count), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            row = [cell.strip() for cell in row]
            if not any(row) and len(row) < 2:
                continue  # an empty line
            if rows and len(row) != len(rows[0]):
                raise DataError(f"{path.name}, line {reader.line_num}: {len(row)} cells, expected {len(rows[0])} as in the first line")
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: {error}") from None
    if header is None:
        header = _has_header(path, rows, lines[0])
    if not header:
        return [f"column_{i + 1}" for i in range(len(rows[0]))], rows, lines, False
    names = _names(path, rows[0], lines[0])
    if len(rows) == 1:
        raise DataError(f"{path.name} has a first line with the names of {len(names)} column(s), but no rows")
    return names, rows[1:], lines[1:], True


def _text(path: Path, encoding: str) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" or content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except OSError as error:  # gzip.BadGzipFile is one
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error):
        raise DataError(f"{path} cannot be read: it is not a whole gzip file") from None
    if content[:4] == b"PK\x03\x04":
        raise DataError(f"{path} cannot be read: it is a zip archive or a spreadsheet; save it as CSV")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise DataError(f"--encoding {encoding}: there is no such encoding; usual ones are utf-8, latin-1, cp1252, utf-16") from None
    except UnicodeError as error:
        line = content.count(b"\n", 0, error.start) + 1 if isinstance(error, UnicodeDecodeError) else 1
        guess = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
        advice = f"its first bytes say --encoding {guess}" if guess else "name its encoding, such as --encoding latin-1, cp1252 or utf-16"
        raise DataError(f"{path} cannot be read: it is not {encoding.upper()} text (line {line}); {advice}") from None
    if "\0" in text:
        raise DataError(
            f"{path} cannot be read: it holds zero bytes, so it is not {encoding.upper()} text; try --encoding utf-16-le or utf-16-be"
        )
    return text


def number(cell: str) -> float | None:
    """What a cell says as a number, or None; NaN and infinity are numbers here."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _is_number(cell: str) -> bool:
    return number(cell) is not None or re.fullmatch(_COMMA, cell) is not None


def _has_header(path: Path, rows: list[list[str]], line: int) -> bool:
    """Whether the first line names the columns; where it seems to be a row like the others, that is said rather than guessed."""
    first, others = rows[0], rows[1:]
    if all(map(_is_number, first)):
        seems = "only numbers"
    elif others and (i := next((i for i, cell in enumerate(first) if _numeric(cell, [row[i] for row in others])), None)) is not None:
        seems = f"{first[i]!r} is a number like those below it"
    elif others and all(cell.lower() in MISSING or cell in {row[i] for row in others} for i, cell in enumerate(first)):
        seems = "every cell is a value of its column"
    else:
        return True
    raise DataError(
        f"{path.name}, line {line}: {seems}; the first line must name the columns. Say --no-header if it is a row, --header if it is the names"
    )


def _numeric(cell: str, below: list[str]) -> bool:
    """Whether the cell is a number and most of those below it are."""
    present = [other for other in below if other.lower() not in MISSING]
    return cell.lower() not in MISSING and _is_number(cell) and 2 * sum(map(_is_number, present)) > len(present) > 0


def _names(path: Path, cells: list[str], line: int) -> list[str]:
    names = [name or f"column_{i + 1}" for i, name in enumerate(cells)]  # R writes row numbers under an empty name
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path.name}, line {line}: the column name {name!r} is used {times} times")
    return names


def point_decimals(cells: dict[str, int]) -> dict[str, str]:
    """How the numbers with a decimal comma among a column's cells (cell -> its line) are written with a point; {} if it has none, or is not numbers.

    Raises:
        DataError: every comma could separate thousands as well.
    """
    commas = {cell for cell in cells if re.fullmatch(_COMMA, cell)}
    if not commas or 2 * (len(commas) + sum(number(cell) is not None for cell in cells)) <= len(cells):
        return {}
    if all(re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", cell) for cell in commas):
        cell = min(commas, key=lambda cell: cells[cell])
        raise DataError(
            f"line {cells[cell]}: {cell!r} may be {cell.replace(',', '.')} or {cell.replace(',', '')}; write it with a decimal point, or without the comma"
        )
    grouped = {cell for cell in cells if re.fullmatch(r"[+-]?[1-9]\d{0,2}(\.\d{3})+", cell)}
    if any("." in cell and number(cell) is not None for cell in cells.keys() - grouped):
        grouped = set()  # a point that separates no thousands is a decimal one, beside the commas
    return {cell: cell.replace(".", "").replace(",", ".") for cell in commas | grouped}
