"""Finds the file of a data set, and makes sure that it is the right one."""

import hashlib
import os
from pathlib import Path

from mmfast.data.table import DataError


def folders() -> list[Path]:
    """Where data files are looked for: the folder that MMFAST_DATA names, then the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfast" / "data"
    named = os.environ.get("MMFAST_DATA")
    return [Path(named), cache] if named else [cache]


def read(name: str, file: str, sha256: str) -> tuple[Path, bytes]:
    """The path of a data set's file, and what is in it.

    Raises:
        DataError: it is nowhere, or its checksum is another.
    """
    tried = [folder / file for folder in folders()]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        places = " or ".join(map(str, tried))
        raise DataError(f"{name} is not here: there is no {places}; put the file there, or name its folder in MMFAST_DATA")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise DataError(f"{path} has sha256 {found}, expected {sha256}: it is truncated or another version of {name}")
    return path, content
