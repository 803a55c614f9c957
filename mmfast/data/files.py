"""Finds the file of a data set, downloads it if it is nowhere, and makes sure that it is the right one."""

import contextlib
import gzip
import hashlib
import http.client
import logging
import os
import urllib.request
import zlib
from pathlib import Path

from mmfast.data.sets import DataSet
from mmfast.data.table import DataError

_LOG = logging.getLogger(__name__)
_TIMEOUT = 30.0  # seconds without an answer


def folders() -> list[Path]:
    """Where data files are looked for: the folder that MMFAST_DATA names, then the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfast" / "data"
    named = os.environ.get("MMFAST_DATA")
    return [Path(named), cache] if named else [cache]


def find(file: str) -> Path | None:
    """The first of `folders()` that has the file, with it; None if none has."""
    return next((folder / file for folder in folders() if (folder / file).is_file()), None)


def read(name: str, data: DataSet) -> list[str]:
    """The lines of a data set's file, from a folder or else from its address; what was downloaded is kept in the cache.

    Raises:
        DataError: it is nowhere and cannot be downloaded, it cannot be unpacked, or its checksum is another.
    """
    path = find(data.file)
    if path is None:
        return _download(name, data)
    try:
        content = path.read_bytes()
        return _lines(name, str(path), gzip.decompress(content) if path.suffix == ".gz" else content, data.sha256)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lines(name: str, where: str, content: bytes, sha256: str) -> list[str]:
    """The text in a file, if it is the right one."""
    content = content.replace(b"\r\n", b"\n")  # of two copies of a file one may have been through another system
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise DataError(f"{where} has sha256 {found} (unpacked), expected {sha256}: it is truncated or another version of {name}")
    try:
        return content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read: {error}") from None


def _download(name: str, data: DataSet) -> list[str]:
    """The lines that are at the address, now in the cache too; nothing is written unless they are whole and the right ones."""
    places = [folder / data.file for folder in folders()]
    nowhere = f"{name} is not here: there is no {' or '.join(map(str, places))}"
    if not data.address:
        raise DataError(f"{nowhere}; put {data.source or 'the file'} there, or name its folder in MMFAST_DATA")
    _LOG.info("downloading %s from %s", name, data.address)
    try:
        with urllib.request.urlopen(data.address, timeout=_TIMEOUT) as answer:
            content: bytes = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{nowhere}, and {data.address} gives {type(error).__name__}: {error}") from None
    lines = _lines(name, data.address, content, data.sha256)
    path = places[-1]
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise DataError(f"{name} was downloaded, but {path} cannot be written: {error.strerror}") from None
    return lines
