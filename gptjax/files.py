"""Files and folders: paths by one rule, writes that a kill cannot halve, one JSON reader.

A run may live on a disk or in a bucket (gs://BUCKET/PATH). In a bucket there is no appending, no
renaming, no lock and no empty folder; a file appears whole.
"""

import contextlib
import fcntl
import functools
import glob
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptjax.errors import RunError, UserError, first_line

LONGEST_TEXT = 1 << 30
"""Bytes of a file that is read whole (a device would never end)."""

CONNECT_SECONDS = 10
"""For a bucket's server to answer."""


def path(name: str) -> Path:
    """The path that a user means by `name`: ~ is the home directory; gs://BUCKET/... becomes an
    `epath.Path`, which is used like a Path. Raises UserError for another scheme, for a bucket that
    cannot be used or without the package that it takes, and for a ~ of nobody."""
    scheme = re.match(r"([a-zA-Z][\w+.-]+)://([^/]*)", name)
    if scheme is None:
        try:
            return Path(name).expanduser() if name.startswith("~") else Path(name)
        except RuntimeError:
            raise UserError(f"{name}: there is no such home directory") from None
    if scheme[1] != "gs":
        raise UserError(f"{name}: {scheme[1]}:// is not supported; use a folder or gs://BUCKET/...")
    if not scheme[2]:
        raise UserError(f"{name} names no bucket; expected gs://BUCKET/...")
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{name}: gs:// needs the package gcsfs; pip install gcsfs")
    _reach(scheme[2])
    from etils import epath

    return epath.Path(name)


@functools.cache
def _reach(bucket: str) -> None:
    """UserError: it cannot be used. gcsfs tries for minutes, and takes any failure for "there is no
    such file"; so it is asked for one name in the bucket, once a server is known to answer."""
    import urllib.request  # slow, and only needed here

    import fsspec  # optional: it comes with gcsfs

    # Ask for a listing each time: other processes write there too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs it raises too
    asked = os.environ.get("STORAGE_EMULATOR_HOST", "").strip()
    server = urlsplit("https://storage.googleapis.com")
    if asked not in ("", "default"):  # as gcsfs understands it
        server = urlsplit(asked if "://" in asked else f"http://{asked}")
    try:
        if server.scheme not in urllib.request.getproxies():
            port = server.port or {"http": 80}.get(server.scheme, 443)
            socket.create_connection((server.hostname or "", port), CONNECT_SECONDS).close()
        _buckets().call("GET", "b/{}/o", bucket, maxResults="1")
    except Exception as error:  # of gcsfs, google-auth, aiohttp and the system
        raise UserError(
            f"cannot reach gs://{bucket} at {server.netloc}: {first_line(error)}; check the"
            " network, the bucket's name and your credentials (gcloud auth application-default"
            " login)"
        ) from None


def is_remote(path: Path) -> bool:
    """Whether it is in a bucket."""
    return not isinstance(path, Path)


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder, with their bytes; none if there is no such folder. UserError: it
    cannot be read."""
    with readable(folder):
        if not is_remote(folder):
            found = [*os.scandir(folder)] if folder.is_dir() else []
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
        try:
            listed = _buckets().ls(str(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {os.path.basename(x["name"]): x["size"] for x in listed if x["type"] == "file"}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """UserError: what is read in the block, `path` or something in it, cannot be read."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # a bucket's, of gcsfs and aiohttp, are often no OSError
        if not isinstance(error, OSError) and not is_remote(path):
            raise
        name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise UserError(f"cannot read {name or path}: {reason or first_line(error)}") from None


class Ranges:
    """Files of one folder, parts of which are read: by any number of threads at once, and from a
    bucket by many requests at once."""

    def __init__(self, paths: Sequence[Path]):
        """Raises OSError."""
        self.paths, self._descriptors = list(paths), list[int]()
        if not any(map(is_remote, paths)):
            with contextlib.ExitStack() as opened:
                opened_files = [opened.enter_context(path.open("rb")) for path in paths]
                self._descriptors = [file.fileno() for file in opened_files]
                weakref.finalize(self, opened.pop_all().close)

    def read(self, parts: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Of each (which of the paths, first byte, end); less where a file ends before. Raises
        OSError."""
        if self._descriptors:
            return [_read(self._descriptors[n], at, end) for n, at, end in parts]
        numbers, starts, ends = zip(*parts, strict=True) if parts else ((), (), ())
        found = _buckets().cat_ranges(
            [str(self.paths[n]) for n in numbers], [*starts], [*ends], on_error="return"
        )
        for i, (n, content) in enumerate(zip(numbers, found, strict=True)):
            if getattr(content, "code", None) == 416:  # it ends before this range begins
                found[i] = b""
            elif isinstance(content, Exception):  # of gcsfs, aiohttp and the system
                gone = isinstance(content, FileNotFoundError)
                reason = "it is no longer there" if gone else first_line(content)
                raise OSError(None, reason, str(self.paths[n])) from content
        return found


def _read(descriptor: int, at: int, end: int) -> bytes:
    """Bytes [at, end) of a file; fewer only where it ends. (One call reads 2 GiB at most.)"""
    parts = list[bytes]()
    while at < end and (part := os.pread(descriptor, end - at, at)):
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _buckets() -> Any:
    import fsspec

    return fsspec.filesystem("gs")


def cache_dir() -> Path:
    """Where downloads and compiled programs are kept: $GPTJAX_CACHE_DIR, else ~/.cache/gptjax."""
    if named := os.environ.get("GPTJAX_CACHE_DIR"):
        return path(named)
    try:
        return Path.home() / ".cache" / "gptjax"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"gptjax-{os.getuid()}"


def write_atomic(path: Path, text: str) -> None:
    """Write `text`, all at once: a kill leaves the old file or the new one. Raises OSError."""
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_text(path: Path, name: str = "") -> str:
    """What a file says, as `decode`. `name`: for messages; "": its path. Raises UserError if it
    cannot be read, is too large, or is no text."""
    name = name or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_TEXT + 1)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or first_line(error)}") from None
    return decode(content, name)


def read_stdin(name: str) -> str:
    """What standard input says, as `read_text`."""
    if sys.stdin is None:
        raise UserError(f"cannot read {name}: standard input is closed")
    try:
        return decode(sys.stdin.buffer.read(LONGEST_TEXT + 1), name)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None


def decode(content: bytes, name: str) -> str:
    """A text in UTF-8, without the byte order mark that it may begin with; its line ends stay as
    they are. Raises UserError, which calls it `name`."""
    if len(content) > LONGEST_TEXT:
        raise UserError(f"{name} is larger than {LONGEST_TEXT:,} bytes, or never ends")
    if (nul := content.find(b"\0")) >= 0:  # UTF-8 has it, texts have not
        raise not_utf8(name, 0, nul)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(name, content[error.start], error.start) from None


def not_utf8(name: str, byte: int, at: int) -> UserError:
    """For a text that is none."""
    return UserError(
        f"{name} is not UTF-8 text (byte 0x{byte:02x} at {at}); convert it, for instance with"
        " iconv, or leave it out if it is binary"
    )


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """A JSON value. Raises UserError, which names `where` it came from, if it is none or an object
    has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict[str, Any]()
        for name, value in pairs:
            if name in found:
                raise UserError(f"{where} names {name!r} twice")
            found[name] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: `text` is no text
        raise UserError(f"{where} is not valid JSON: {first_line(error)}") from None


@contextlib.contextmanager
def new_folder(path: Path, *, goes_on: bool = False) -> Iterator[Path]:
    """A hidden folder beside `path`, which takes its name when the block ends without an error and
    is removed otherwise. Folders that killed processes left behind are removed too; but with
    `goes_on` one of them is taken as it is. OSError if it cannot be made, or `path` is there and
    not empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        with _locked(path.parent):  # nobody looks for leftovers while another one begins
            left = [*path.parent.glob(f".{glob.escape(path.name)}.*")]
            scratch = None
            for leftover in sorted(left, key=lambda each: each.stat().st_mtime, reverse=True):
                with contextlib.suppress(OSError), contextlib.ExitStack() as lock:
                    lock.enter_context(_locked(leftover, fcntl.LOCK_NB))
                    if goes_on and not scratch:
                        scratch = leftover
                        locks.push(lock.pop_all())
                    else:
                        shutil.rmtree(leftover)
            if not scratch:
                scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
                locks.enter_context(_locked(scratch))
            locks.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, path)


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Locked as long as this process lives; with LOCK_NB, OSError where another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        except OSError:  # without LOCK_NB: a network file system that has no locks
            if flags:
                raise
        yield
    finally:
        os.close(descriptor)
