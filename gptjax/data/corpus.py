"""Where text comes from: the built-in corpus, Tiny Shakespeare, and the user's own files."""

import codecs
import glob
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gptjax import files
from gptjax.errors import UserError, quoted

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

READ = (".txt", ".jsonl", ".ndjson", ".json")
"""Endings of what is taken from a folder."""

UNREAD = (
    ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".pdf", ".docx", ".gz", ".bz2", ".xz", ".zst",
    ".zip", ".tar",
)  # fmt: skip
"""Endings of what would be misread as text."""

READ_BYTES = 1 << 20
CUT_WITHIN = 1 << 16
"""A piece is cut at a word's end among this many of its last characters."""
LAST_WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)
LONGEST_PIECE = 16 << 20
"""Characters. Text without white space is cut here anyway, to bound memory."""


def find_files(source: str | None) -> list[Path]:
    """The text files behind `source`, as `find`."""
    return find(source)[0]


def find(source: str | None) -> tuple[list[Path], Counter[str]]:
    """(the text files behind `source` (see `DataConfig.source`) in a fixed order, {reason: how many
    files of a folder or a glob were left out}). Raises UserError if there are none, one is of a
    kind that is not read, or Tiny Shakespeare could not be downloaded."""
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
        reasons = {p: _why_not(p, path) for p in found}
        left_out = Counter(filter(None, reasons.values()))
        found = [p for p in found if not reasons[p]]
    if not found:
        raise UserError(
            f"no text at {source!r}: expected builtin (if this Python has its library's source),"
            " shakespeare, or on a disk of this machine a .txt or .jsonl file, a folder with some,"
            f" or a glob of them{_listed('; left out', left_out)}"
        )
    for p in found:
        if p.suffix.lower() in UNREAD:
            raise UserError(
                f"{p} is a {p.suffix} file, which is not read; convert it to text (.txt) or to JSON"
                " lines (.jsonl), an object with a string `text` a line"
            )
        if p.suffix.lower() == ".json" and kind(p) == "text":
            raise UserError(
                f"{p} is neither an array of objects with a string `text` nor such an object a line"
                " (if it is to be read as it is, call it .txt)"
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


def _why_not(path: Path, root: Path) -> str:
    """Why a file of the folder or glob `root` is left out; "": it is not."""
    folder, suffix = root.is_dir(), path.suffix.lower()
    if folder and any(part.startswith(".") for part in path.relative_to(root).parts):
        return "hidden"
    if path.stat().st_size == 0:
        return "empty"
    inside = {folder.parent for folder in path.parents if folder.name == "checkpoints"}
    beside = {path.parent} if path.name in ("metrics.jsonl", "config.json") else set()
    for run in inside | beside:
        if (run / "checkpoints").is_dir() and (run / "config.json").is_file():
            return "of a run"
    if folder and (suffix not in READ or (suffix == ".json" and kind(path) == "text")):
        return suffix or "without an ending"
    return ""


def kind(path: Path) -> Literal["text", "JSON lines", "a JSON array"]:
    """How a file is read: by its name's ending, and by its beginning."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "JSON lines"
    try:
        with path.open("rb") as file:
            read = iter(lambda: file.readline(LONGEST_PIECE), b"")
            content = (line.removeprefix(codecs.BOM_UTF8).strip() for line in read)
            lines = list(itertools.islice(filter(None, content), 2))
    except OSError:
        return "text"  # whose reader says what is wrong
    if path.suffix.lower() == ".json" and lines and lines[0].startswith(b"["):
        return "a JSON array"
    try:
        found = [json.loads(line) for line in lines if line.startswith(b"{")]
    except (ValueError, RecursionError):
        return "text"
    texts = [item for item in found if isinstance(item, dict) and "text" in item]
    return "JSON lines" if texts and len(texts) == len(lines) else "text"


def describe(paths: list[Path], left_out: Counter[str]) -> str:
    """How the files are read, in a line: "3 files as text, 1 as JSON lines; left out: 2 hidden"."""
    kinds = Counter(kind(path) for path in paths)
    read = ", ".join(f"{count:,} as {name}" for name, count in kinds.most_common())
    return f"files read: {read}{_listed('; left out', left_out)}"


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


def read_documents(paths: list[Path]) -> Iterator[Iterator[str]]:
    """Each document as an iterator of pieces. A document is a whole file, or one
    line or item of JSON.

    The pieces of a document join to its text. They end where every tokenizer ends a token anyway,
    before the white space that follows a word, so tokens do not depend on how a text is cut.

    Raises UserError if a file is empty or not UTF-8 text, or a line or item of JSON has no `text`.
    """
    for path in paths:
        if (how := kind(path)) == "text":
            yield _cut(_checked(path, _decode(path)))
        else:
            texts = _jsonl_texts(path) if how == "JSON lines" else _array_texts(path)
            for text in _checked(path, texts):
                yield iter([text])


def read_pieces(
    paths: list[Path], separator: str | None, end_of_text: str | None = None
) -> Iterator[str | None]:
    """The pieces of all documents, with `separator` between documents (None stands for the
    end-of-text token). `end_of_text`: what ends a document within a file, a word by itself. Raises
    as `read_documents`."""
    if end_of_text is None:
        for number, document in enumerate(read_documents(paths)):
            if number:
                yield separator
            yield from document
        return
    began = ended = False
    for document in read_documents(paths):
        for piece in document:  # which cuts no word
            for number, part in enumerate(piece.split(end_of_text)):
                ended = ended or number > 0
                if part:
                    if began and ended:
                        yield separator
                    began, ended = True, False
                    yield part
        ended = True


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
                raise files.not_utf8(str(path), error.object[error.start], at) from None


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                text = _text(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f"{path}, line {number} is not a JSON object in UTF-8 with a string `text`:"
                    f" {line[:80].decode(errors='replace').strip()}"
                ) from None
            yield text


def _array_texts(path: Path) -> Iterator[str]:
    for number, item in enumerate(files.read_json(path), 1):
        try:
            text = _text(item)
        except (LookupError, TypeError, AttributeError):
            raise UserError(
                f"{path}, item {number} of its array is not an object with a string `text`:"
                f" {quoted(item)[:80]}"
            ) from None
        yield text


def _text(item: Any) -> str:
    # JSON can spell half of a surrogate pair, which UTF-8 cannot.
    return item["text"].encode("utf-8", "replace").decode()


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
