"""Where text comes from: the built-in corpus, Tiny Shakespeare, and the user's own files."""

import codecs
import glob
import hashlib
import itertools
import json
import os
import re
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from gptjax import files
from gptjax.errors import UserError

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

READ_BYTES = 1 << 20
CUT_WITHIN = 1 << 16
"""A piece is cut at a word's end among this many of its last characters."""
LAST_WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)
LONGEST_PIECE = 16 << 20
"""Characters. Text without white space is cut here anyway, to bound memory."""


def find_files(source: str | None) -> list[Path]:
    """The text files behind `source` (see `DataConfig.source`), in a fixed order. Raises UserError
    if there are none, or Tiny Shakespeare could not be downloaded."""
    if source is None:
        raise UserError(
            "the text that these weights were trained on is not known; name the text to train on"
            " with --data.source FILE, or a prepared folder with --data.dir FOLDER"
        )
    if source == "shakespeare":
        return [_shakespeare()]
    path = Path(source) if "://" in source else files.path(source)  # only a disk has texts
    if source == "builtin":
        found = _standard_library()
    elif path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")]
    else:
        found = [path] if path.is_file() else [*map(Path, glob.glob(str(path), recursive=True))]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise UserError(
            f"no text at {source!r}: expected builtin (if this Python has its library's source),"
            " shakespeare, or on a disk of this machine a .txt or .jsonl file, a folder with some,"
            " or a glob of them"
        )
    return found


def _standard_library() -> list[Path]:
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    found = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    # ASCII only keeps the character vocabulary small: a few files list whole encodings.
    return [p for p in found if p.stat().st_size and p.read_bytes().isascii()]


def _shakespeare() -> Path:
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


def read_documents(paths: list[Path]) -> Iterator[Iterator[str]]:
    """Each document as an iterator of pieces. A document is a whole file, or one line of a .jsonl.

    The pieces of a document join to its text. They end where every tokenizer ends a token anyway,
    before the white space that follows a word, so tokens do not depend on how a text is cut.

    Raises UserError if a file is empty or not UTF-8 text, or a line of a .jsonl has no `text`.
    """
    for path in paths:
        if path.suffix == ".jsonl":
            for text in _checked(path, _jsonl_texts(path)):
                yield iter([text])
        else:
            yield _cut(_checked(path, _decode(path)))


def read_pieces(paths: list[Path], separator: str | None) -> Iterator[str | None]:
    """The pieces of all documents, with `separator` between documents (None stands for the
    end-of-text token). Raises as `read_documents`."""
    for number, document in enumerate(read_documents(paths)):
        if number:
            yield separator
        yield from document


def _checked(path: Path, texts: Iterator[str]) -> Iterator[str]:
    empty = True
    try:
        for text in texts:
            empty = False
            yield text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if empty:
        raise UserError(f"{path} is empty; expected text")


def _decode(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte order mark is not text
    with path.open("rb") as file:
        for block in itertools.chain(iter(lambda: file.read(READ_BYTES), b""), [b""]):
            try:
                if (nul := block.find(b"\0")) >= 0:  # UTF-8 has it, texts have not
                    raise UnicodeDecodeError("utf-8", block, nul, nul + 1, "NUL")
                if text := decoder.decode(block, final=not block):
                    yield text
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise UserError(
                    f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {at});"
                    " convert it, for instance with iconv, or leave it out if it is binary"
                ) from None


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                # JSON can spell half of a surrogate pair, which UTF-8 cannot.
                text = json.loads(line)["text"].encode("utf-8", "replace").decode()
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f"{path}, line {number} is not a JSON object in UTF-8 with a string `text`:"
                    f" {line[:80].decode(errors='replace').strip()}"
                ) from None
            yield text


def _cut(texts: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        rest += text
        near = max(0, len(rest) - CUT_WITHIN)
        if word := LAST_WORD_END.match(rest, near):
            cut = word.end()
        else:
            cut = len(rest) if len(rest) > LONGEST_PIECE else 0
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
