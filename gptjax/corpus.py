"""Where text comes from: the built-in corpus, Tiny Shakespeare, and the user's files."""

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

from gptjax.errors import UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

READ_BYTES = 1 << 20
# Where a piece ends is looked for in so many of its last characters.
CUT_WITHIN = 1 << 16
# A text without white space is cut here all the same, so that memory stays bounded.
LONGEST_PIECE = 16 << 20


def cache_dir() -> Path:
    """Where downloads and compiled programs are kept: $GPTJAX_CACHE_DIR, else ~/.cache/gptjax."""
    return Path(os.environ.get("GPTJAX_CACHE_DIR") or Path.home() / ".cache" / "gptjax")


def find_files(source: str | None) -> list[Path]:
    """The text files behind a source, in a fixed order.

    Raises:
        UserError: nothing is there, or Tiny Shakespeare could not be downloaded.
    """
    if source == "builtin":
        return _standard_library()
    if source == "shakespeare":
        return [_shakespeare()]
    if source is None:
        raise UserError(
            "the text that these weights were trained on is not known; name one to go on with:"
            " --data.source FILE, or --data.dir FOLDER"
        )
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not files:
            raise UserError(f"the folder {source} holds no .txt or .jsonl file")
        return files
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise UserError(
            f"no text at {source!r}: expected builtin, shakespeare, or a .txt or .jsonl file,"
            " a folder, or a glob of them"
        )
    return files


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    # Pure ASCII keeps the character vocabulary small (a few files list whole encodings).
    files = [p for p in sorted(files) if p.stat().st_size and p.read_bytes().isascii()]
    if not files:
        raise UserError(
            f"this Python has no standard library source under {root}; name a text of your own"
            " with --data.source"
        )
    return files


def _shakespeare() -> Path:
    path = cache_dir() / "tinyshakespeare.txt"
    try:
        if not path.exists():
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                text = response.read()
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"Tiny Shakespeare could not be downloaded ({error}); put the file from"
            f" {SHAKESPEARE_URL} at {path}"
        ) from None
    if found != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path} is not Tiny Shakespeare (sha256 {found}, expected {SHAKESPEARE_SHA256});"
            " delete it to download it again"
        )
    return path


def read_documents(files: list[Path]) -> Iterator[Iterator[str]]:
    """Each document as an iterator of pieces: a whole file, or one line of a .jsonl.

    Pieces join to the document, and end where every tokenizer ends a token anyway: before the
    white space that follows a word. So tokens do not depend on the pieces.

    Raises:
        UserError: a file that is empty, binary, not UTF-8, or a .jsonl line without `text`.
    """
    for path in files:
        if path.suffix == ".jsonl":
            for text in _jsonl_texts(path):
                yield iter([text])
        else:
            yield _cut(_decode(path))


def _decode(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, some = 0, False
    with _open(path) as file:
        while True:
            block = file.read(READ_BYTES)
            if b"\0" in block:
                where = offset + block.index(b"\0")
                raise UserError(f"{path} looks binary (a NUL byte at {where}); expected UTF-8 text")
            try:
                pending = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = offset - pending + error.start
                raise UserError(
                    f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {where});"
                    " convert it, for instance with iconv"
                ) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")  # a byte order mark is not text
            if text:
                some = True
                yield text
            if not block:
                break
            offset += len(block)
    if not some:
        raise UserError(f"{path} is empty; expected text")


def _jsonl_texts(path: Path) -> Iterator[str]:
    some = False
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            some = True
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
                raise UserError(f"{path}, line {number} is not JSON in UTF-8") from None
            text = document.get("text") if isinstance(document, dict) else None
            if not isinstance(text, str):
                has = ", ".join(document) if isinstance(document, dict) else ""
                if "text" in has.split(", "):
                    has = f"text: {json.dumps(text)[:40]}"
                raise UserError(
                    f"{path}, line {number} has no string field `text` (it has {has or 'none'})"
                )
            # JSON may spell half a surrogate pair, which no file can hold.
            yield text.encode("utf-8", "replace").decode()
    if not some:
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
    """The last place near the end where a word is followed by a space or line end; else 0."""
    near = max(0, len(text) - CUT_WITHIN)
    places = [match.start() for match in re.finditer(r"(?<=\S)[ \n]", text[near:])]
    return near + places[-1] if places else 0
