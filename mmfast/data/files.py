"""Finds the file of a data set, downloads it if it is nowhere, and makes sure that it is the right one."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from mmfast.data.sets import DataSet
from mmfast.data.table import DataError

_TIMEOUT = 30.0  # seconds without an answer

Normal = Callable[[bytes], bytes]  # brings what is in a file into the form whose digest is known


def folders() -> list[Path]:
    """Where data files are looked for: the folder that MMFAST_DATA names, then the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfast" / "data"
    named = os.environ.get("MMFAST_DATA")
    return [Path(named), cache] if named else [cache]


def find(file: str) -> Path | None:
    """The first of `folders()` that has the file, with it; None if none has."""
    return next((folder / file for folder in folders() if (folder / file).is_file()), None)


def read(name: str, data: DataSet) -> list[str]:
    """The lines of a data set's file.

    Raises:
        DataError: as `content`, or it is not text.
    """
    # of two copies of a file one may have been through another system
    lines = content(name, data.file, data.sha256, data.address, data.source, lambda found: found.replace(b"\r\n", b"\n"))
    try:
        return lines.decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"the file of {name} cannot be read: {error}") from None


def content(name: str, file: str, digest: str, address: str = "", source: str = "", normal: Normal = bytes) -> bytes:
    """What is in a file, unpacked, from a folder or else from its address; what was downloaded is kept in the cache.

    Args:
        name: of the data set.
        file: below a data folder; unpacked where it ends in .gz.
        digest: sha256 of what is in it, or "md5:" and that; empty where it is not checked.
        address: where it is published, packed if that ends in .gz.
        source: what to put in place by hand where there is no address.
        normal: see `Normal`.

    Raises:
        DataError: it is nowhere and cannot be downloaded, it cannot be unpacked, or its digest is another.
    """
    path = find(file)
    if path is None:
        return _download(name, file, digest, address, source, normal)
    try:
        found = path.read_bytes()
        return _checked(name, str(path), normal(gzip.decompress(found) if path.suffix == ".gz" else found), digest)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _checked(name: str, where: str, found: bytes, digest: str) -> bytes:
    """What was found, if it is the right thing."""
    kind, _, expected = digest.rpartition(":")
    kind = kind or "sha256"
    value = hashlib.new(kind, found, usedforsecurity=False).hexdigest()
    if digest and value != expected:
        raise DataError(f"{where} has {kind} {value} (unpacked), expected {expected}: it is truncated or another version of {name}")
    return found


def _download(name: str, file: str, digest: str, address: str, source: str, normal: Normal) -> bytes:
    """What is at the address, now in the cache too; nothing stays there unless it is whole and the right thing."""
    places = [folder / file for folder in folders()]
    nowhere = f"{name} is not here: there is no {' or '.join(map(str, places))}"
    if not address:
        raise DataError(f"{nowhere}; put {source or 'the file'} there, or name its folder in MMFAST_DATA")
    try:
        import pooch
    except ImportError:
        raise DataError(f"{nowhere}, and pooch, which downloads it, is not installed: pip install 'mmfast[train]'") from None
    path = places[-1]
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    packed = address.endswith(".gz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise DataError(f"{name} would be downloaded, but {path} cannot be written: {error.strerror}") from None
    try:
        try:
            pooch.HTTPDownloader(timeout=_TIMEOUT)(address, str(part), None)
        except OSError as error:  # as those of requests are
            raise DataError(
                f"{nowhere}, and {address} gives {type(error).__name__}: {error}; put it there by hand, or name its folder in MMFAST_DATA"
            ) from None
        raw = part.read_bytes()
        found = _checked(name, address, normal(gzip.decompress(raw) if packed else raw), digest)
        if path.suffix == ".gz" and not packed:
            part.write_bytes(gzip.compress(raw))
        part.replace(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} was downloaded, but {path} cannot be made of it: {getattr(error, 'strerror', None) or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return found
