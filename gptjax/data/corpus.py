"""Where text comes from: the built-in corpus, Tiny Shakespeare, and the user's own files."""

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.data import hub, readers
from gptjax.errors import UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

UNREAD = (".csv", ".tsv", ".xlsx", ".pdf", ".docx", ".zip", ".tar", ".tgz")
"""Endings of what would be misread as text."""


class Corpus:
    """The documents behind a source."""

    def __init__(self, source: str | None, field: str = "text", end_of_text: str | None = None):
        """As `DataConfig`'s source, text_field and end_of_text. Raises as `find`."""
        self._field, self._end_of_text = field, end_of_text
        self._hub = hub.Split(source) if source and source.startswith(hub.PREFIX) else None
        self._paths, self._left_out = ([], Counter()) if self._hub else find(source, field)
        self._kinds = [readers.kind(path, field) for path in self._paths]

    @property
    def size(self) -> int | None:
        """Bytes of text; None where only reading it would tell."""
        plain = all(path.suffix.lower() not in readers.COMPRESSED for path in self._paths)
        if self._hub or not plain or "a table" in self._kinds:
            return None
        return sum(path.stat().st_size for path in self._paths)

    def identity(self) -> list[Any]:
        """JSON values that are others for another text, or another way to read it."""
        if self._hub:
            return [self._hub.identity(), self._field]
        stats = [(path, path.stat()) for path in self._paths]
        found: list[Any] = [[(str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in stats]]
        # gptjax 0.1 read as JSON what is called .jsonl, and nothing else.
        kinds = zip(self._kinds, self._paths, strict=True)
        if any((how == "text") == (path.suffix == ".jsonl") for how, path in kinds):
            found.append(self._kinds)
        return (
            found
            + [self._end_of_text] * bool(self._end_of_text)
            + [f"field {self._field}"] * (self._field != "text")
        )

    def describe(self) -> str:
        """How it is read, in a line: "3 files as text, 1 as JSON lines; left out: 2 hidden"; "":
        just as one would expect."""
        if self._hub or (self._kinds == ["text"] and not self._left_out):
            return ""
        kinds = Counter(self._kinds).most_common()
        read = ", ".join(f"{count:,} as {name}" for name, count in kinds)
        return f"files read: {read}{_listed('; left out', self._left_out)}"

    def documents(self) -> Iterator[Iterator[str]]:
        """Each as `readers.read` gives it, whose errors it raises."""
        if self._hub:
            for text in self._hub.texts(self._field):
                yield iter([text])
        for path in self._paths:
            yield from readers.read(path, self._field)

    def pieces(self, separator: str | None) -> Iterator[str | None]:
        """The pieces of all documents, with `separator` between documents (None stands for the
        end-of-text token). Raises as `documents`."""
        mark, began, ended = self._end_of_text, False, False
        for document in self.documents():
            for piece in document:
                # What ends a document within a file is a word, and no piece cuts a word.
                for number, part in enumerate(piece.split(mark) if mark else [piece]):
                    ended = ended or number > 0
                    if part or not mark:
                        if began and ended:
                            yield separator
                        began, ended = True, False
                        yield part
            ended = True


def find_files(source: str | None) -> list[Path]:
    """The text files behind `source`, as `find`."""
    return find(source)[0]


def find(source: str | None, field: str = "text") -> tuple[list[Path], Counter[str]]:
    """(the text files behind `source` (see `DataConfig.source`) in a fixed order, {reason: how many
    files of a folder or a glob were left out}). `field`: of JSON. Raises UserError if there are
    none, one is of a kind that is not read, or Tiny Shakespeare could not be downloaded."""
    if source is None:
        raise UserError(
            "the text that these weights were trained on is not known; name the text to train on"
            " with --data.source FILE, or a prepared folder with --data.dir FOLDER"
        )
    left_out = Counter[str]()
    path = Path(source) if "://" in source else files.path(source)  # only a disk has texts
    if source in ("builtin", "shakespeare"):
        found = _standard_library() if source == "builtin" else [_shakespeare()]
    elif _is_file(path):
        found = [path]
    else:
        inside = (
            [*path.rglob("*")] if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        )
        found = [p for p in inside if p.is_file()]
        reasons = {p: _why_not(p, path, field) for p in found}
        left_out = Counter(filter(None, reasons.values()))
        found = [p for p in found if not reasons[p]]
    if not found:
        raise UserError(
            f"no text at {source!r}: expected builtin (if this Python has its library's source),"
            " shakespeare, hf://OWNER/NAME:SPLIT, or on a disk of this machine a text file (.txt),"
            " JSON lines (.jsonl) or a table (.parquet), a folder with some, or a glob of them"
            f"{_listed('; left out', left_out)}"
        )
    for p in found:
        if readers.ending(p) in UNREAD:
            raise UserError(
                f"{p} is a {p.suffix} file, which is not read; convert it to text (.txt) or to JSON"
                f" lines (.jsonl), an object with a string `{field}` a line"
            )
        if readers.ending(p) == ".json" and readers.kind(p, field) == "text":
            raise UserError(
                f"{p} is neither an array of objects with a string `{field}` nor such an object a"
                " line (--data.text-field names the field; if it is to be read as it is, call it"
                " .txt)"
            )
    return sorted(found), left_out


def _is_file(path: Path) -> bool:
    """UserError: it is a pipe or a device, or its name is too long."""
    try:
        special = path.exists() and not path.is_file() and not path.is_dir()
    except OSError as error:
        raise UserError(f"no text at {path}: {error.strerror}") from None
    if special:
        raise UserError(
            f"{path} is no regular file, and texts are read twice; write it to a file first"
        )
    return path.is_file()


def _why_not(path: Path, root: Path, field: str) -> str:
    """Why a file of the folder or glob `root` is left out; "": it is not."""
    folder, suffix = root.is_dir(), readers.ending(path)
    if folder and any(part.startswith(".") for part in path.relative_to(root).parts):
        return "hidden"
    if path.stat().st_size == 0:
        return "empty"
    inside = {folder.parent for folder in path.parents if folder.name == "checkpoints"}
    beside = {path.parent} if path.name in ("metrics.jsonl", "config.json") else set()
    for run in inside | beside:
        if (run / "checkpoints").is_dir() and (run / "config.json").is_file():
            return "of a run"
    unread = suffix == ".json" and readers.kind(path, field) == "text"
    if folder and (unread or suffix not in readers.READ):
        return suffix or "without an ending"
    return ""


def _listed(what: str, counts: Counter[str]) -> str:
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.most_common(9))
    return f"{what}: {listed}" if counts else ""


def _standard_library() -> list[Path]:
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    found = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    # ASCII only keeps the character vocabulary small: a few files list whole encodings.
    return [p for p in found if p.stat().st_size and p.read_bytes().isascii()]


def _shakespeare() -> Path:
    import urllib.request  # slow, and only needed here

    path = files.cache_dir() / "tinyshakespeare.txt"
    try:
        if not path.exists():
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                text = response.read()
            path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: several processes may download it at once.
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            scratch.write_bytes(text)
            scratch.replace(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != SHAKESPEARE_SHA256:
            raise ValueError(f"the sha256 of that file is {digest}, not {SHAKESPEARE_SHA256}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not Tiny Shakespeare: {error}; put the file from {SHAKESPEARE_URL} there"
        ) from None
    return path
