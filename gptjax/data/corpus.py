"""Where text comes from: the built-in corpus, Tiny Shakespeare, and the user's own files."""

import codecs
import glob
import hashlib
import json
import os
import re
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptjax import files
from gptjax.errors import UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

READ_BYTES = 1 << 20
CUT_WITHIN = 1 << 16
"""A piece is cut at a word's end among this many of its last characters."""
LONGEST_PIECE = 16 << 20
"""Characters. Text without white space is cut here anyway, to bound memory."""


def find_files(source: str | None) -> list[Path]:
    """The text files behind `source` (see `DataConfig.source`), in a fixed order.

    Raises:
        UserError: there are none, or Tiny Shakespeare could not be downloaded.
    """
    if source == "builtin":
        return _standard_library()
    if source == "shakespeare":
        return [_shakespeare()]
    if source is None:
        raise UserError(
            "the text that these weights were trained on is not known; name the text to train on"
            " with --data.source FILE, or a prepared folder with --data.dir FOLDER"
        )
    if "://" in source:
        raise UserError(f"{source}: texts are read from disk; download it and name the file")
    path = files.path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not found:
            raise UserError(f"the folder {source} contains no .txt or .jsonl file")
        return found
    found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise UserError(
            f"no text at {source!r}: expected builtin, shakespeare, or a .txt or .jsonl file,"
            " a folder, or a glob of them"
        )
    return found


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    # ASCII only keeps the character vocabulary small: a few files list whole encodings.
    found = [p for p in sorted(found) if p.stat().st_size and p.read_bytes().isascii()]
    if not found:
        raise UserError(
            f"this Python has no standard library source under {root}; use a text of your own"
        )
    return found


def _shakespeare() -> Path:
    path = files.cache_dir() / "tinyshakespeare.txt"
    try:
        if not path.exists():
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                text = response.read()
            path.parent.mkdir(parents=True, exist_ok=True)
            # A unique name: several processes may download it at once.
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"Tiny Shakespeare could not be downloaded ({error}); put the file from"
            f" {SHAKESPEARE_URL} at {path}"
        ) from None
    if digest != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} is not Tiny Shakespeare (sha256 {digest}, expected {SHAKESPEARE_SHA256});"
            " delete it to download it again"
        )
    return path


def read_documents(paths: list[Path]) -> Iterator[Iterator[str]]:
    """Each document as an iterator of pieces. A document is a whole file, or one line of a .jsonl.

    The pieces of a document join to its text. They end where every tokenizer ends a token anyway,
    before the white space that follows a word, so tokens do not depend on how a text is cut.

    Raises:
        UserError: a file is empty, binary or not UTF-8, or a .jsonl line has no `text`.
    """
    for path in paths:
        if path.suffix == ".jsonl":
            for text in _jsonl_texts(path):
                yield iter([text])
        else:
            yield _cut(_decode(path))


def read_pieces(paths: list[Path], separator: str | None) -> Iterator[str | None]:
    """The pieces of all documents, with `separator` between documents (None stands for the
    end-of-text token). Raises as `read_documents`."""
    for number, document in enumerate(read_documents(paths)):
        if number:
            yield separator
        yield from document


def _decode(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, empty = 0, True
    with _open(path) as file:
        while True:
            block = file.read(READ_BYTES)
            if b"\0" in block:
                at = offset + block.index(b"\0")
                raise UserError(f"{path} looks binary (a NUL byte at {at}); expected UTF-8 text")
            try:
                pending = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise UserError(
                    f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {at});"
                    " convert it, for instance with iconv"
                ) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")  # a byte order mark is not text
            if text:
                empty = False
                yield text
            if not block:
                break
            offset += len(block)
    if empty:
        raise UserError(f"{path} is empty; expected text")


def _jsonl_texts(path: Path) -> Iterator[str]:
    empty = True
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
                raise UserError(f"{path}, line {number} is not JSON in UTF-8") from None
            fields = document if isinstance(document, dict) else {}
            text = fields.get("text")
            if not isinstance(text, str):
                found = ", ".join(fields) or "none"
                if "text" in fields:
                    found = f"text: {json.dumps(text)[:40]}"
                raise UserError(
                    f"{path}, line {number} has no string field `text` (it has {found})"
                )
            # JSON can spell half of a surrogate pair, which UTF-8 cannot.
            yield text.encode("utf-8", "replace").decode()
    if empty:
        raise UserError(f"{path} is empty; expected one JSON object a line")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _cut(texts: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        rest += text
        if cut := _last_word_end(rest) or (len(rest) if len(rest) > LONGEST_PIECE else 0):
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_word_end(text: str) -> int:
    """The last position near the end where a word is followed by a space or a line end; else 0."""
    near = max(0, len(text) - CUT_WITHIN)
    ends = [match.start() for match in re.finditer(r"(?<=\S)[ \n]", text[near:])]
    return near + ends[-1] if ends else 0
