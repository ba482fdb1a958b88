"""A file's documents: text, JSON or a table (Parquet, Arrow), each of them compressed or not."""

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from gptjax import files
from gptjax.errors import UserError, quoted

T = TypeVar("T")

TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
OBJECTS = (".jsonl", ".ndjson", ".json", *TABLES)
READ = (".txt", *OBJECTS)
"""Endings of what is taken from a folder, compressed or not."""

READ_BYTES = 1 << 20
CUT_WITHIN = 1 << 16
"""A piece is cut at a word's end among this many of its last characters."""
LAST_WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)
LONGEST_PIECE = 16 << 20
"""Characters. Text without white space is cut here anyway, to bound memory."""
ROWS = 1000
"""Of a table that are in memory at the same time."""

Kind = Literal["text", "JSON lines", "a JSON array", "a table"]

MISSING = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading JSON, or a field of it, may raise."""


def ending(path: Path) -> str:
    """A name's ending in lower case, without that of its compression."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in COMPRESSED else suffix


def kind(path: Path, field: str = "text") -> Kind:
    """How a file is read: by its name's ending, and by its beginning."""
    if ending(path) in TABLES:
        return "a table"
    if ending(path) in (".jsonl", ".ndjson"):
        return "JSON lines"
    try:
        with _reading(path), _open(path) as file:
            read = iter(lambda: file.readline(LONGEST_PIECE), b"")
            content = (line.removeprefix(codecs.BOM_UTF8).strip() for line in read)
            lines = list(itertools.islice(filter(None, content), 2))
    except UserError:
        return "text"  # whose reader says what is wrong
    if ending(path) == ".json" and lines and lines[0].startswith(b"["):
        return "a JSON array"
    try:
        found = [json.loads(line) for line in lines if line.startswith(b"{")]
    except (ValueError, RecursionError):
        return "text"
    texts = [item for item in found if isinstance(item, dict) and field.split(".")[0] in item]
    return "JSON lines" if texts and len(texts) == len(lines) else "text"


def read(path: Path, field: str = "text") -> Iterator[Iterator[str]]:
    """Each document as an iterator of pieces. A document is a whole file of text, or the `field` of
    a line or item of JSON, or of a row; "meta.body" is the field body of the field meta.

    The pieces of a document join to its text. They end where every tokenizer ends a token anyway,
    before the white space that follows a word, so tokens do not depend on how a text is cut.

    Raises UserError if a file is empty, damaged or not UTF-8 text, or something has no such field.
    """
    readers = {"JSON lines": _lines, "a JSON array": _array, "a table": _rows}
    if (how := kind(path, field)) == "text":
        yield _cut(_checked(path, _decode(path)))
    else:
        for text in _checked(path, readers[how](path, field)):
            yield iter([text])


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, an object with all its fields) of each line or item of JSON, or row of a table.
    Raises UserError as `read`."""
    empty = True
    with _reading(path):
        for where, row in _objects(path):
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object: {quoted(row)[:80]}")
            empty = False
            yield where, row
    if empty:
        raise UserError(f"{path} is empty; expected one JSON object a line")


def parse_rows(path: Path, parse: Callable[[dict[str, Any]], T], what: str) -> list[T]:
    """`parse` of each of `rows`. UserError as `read`, or where `parse` raises it, or one of
    `MISSING` for what is not `what`."""
    found = []
    for where, row in rows(path):
        try:
            found.append(parse(row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except MISSING:
            raise UserError(f"{where} is not {what}") from None
    return found


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    if ending(path) in TABLES:
        for number, row in enumerate(_table(path, ""), 1):
            yield f"{path}, row {number}", row
        return
    text = "".join(_decode(path))
    if text.lstrip().startswith("["):
        for number, item in enumerate(files.parse_json(text, str(path)), 1):
            yield f"{path}, item {number}", item
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, files.parse_json(line, where)


def of_row(row: Any, field: str) -> str:
    """Raises one of `MISSING`."""
    names = [field] if field in row else field.split(".")
    for name in names:
        row = row[name]
    # JSON can spell half of a surrogate pair, which UTF-8 cannot.
    return row.encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """UserError: it cannot be read, or its compression is damaged."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a module that is optional
            raise
        raise UserError(f"{path} is damaged: {error}") from None


def _open(path: Path) -> Any:
    """A binary file: its bytes, decompressed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".zst":
            try:  # optional
                import zstandard
            except ImportError:
                how = "pip install 'gptjax[data]'"
                raise UserError(f"reading {path} takes zstandard: {how}") from None
            frames = zstandard.ZstdDecompressor().stream_reader(
                path.open("rb"), read_across_frames=True, closefd=True
            )
            return io.BufferedReader(frames)
    return path.open("rb")


def _checked(path: Path, texts: Iterator[str]) -> Iterator[str]:
    empty = True
    with _reading(path):
        for text in texts:
            empty = False
            yield text
    if empty:
        raise UserError(f"{path} is empty; expected text")


def _decode(path: Path) -> Iterator[str]:
    decoder, at = codecs.getincrementaldecoder("utf-8-sig")(), 0  # a byte order mark is not text
    with _open(path) as file:
        for block in itertools.chain(iter(lambda: file.read(READ_BYTES), b""), [b""]):
            at += len(block)
            try:
                if (nul := block.find(b"\0")) >= 0:  # UTF-8 has it, texts have not
                    raise UnicodeDecodeError("utf-8", block, nul, nul + 1, "NUL")
                if text := decoder.decode(block, final=not block):
                    yield text
            except UnicodeDecodeError as error:
                position = at - len(error.object) + error.start
                raise files.not_utf8(str(path), error.object[error.start], position) from None


def _lines(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                text = of_row(json.loads(line), field)
            except MISSING:
                raise UserError(
                    f"{path}, line {number} is not a JSON object in UTF-8 with a string `{field}`:"
                    f" {line[:80].decode(errors='replace').strip()}{_other(field)}"
                ) from None
            yield text


def _array(path: Path, field: str) -> Iterator[str]:
    for number, item in enumerate(files.parse_json("".join(_decode(path)), str(path)), 1):
        try:
            text = of_row(item, field)
        except MISSING:
            raise UserError(
                f"{path}, item {number} of its array is not an object with a string `{field}`:"
                f" {quoted(item)[:80]}{_other(field)}"
            ) from None
        yield text


def _rows(path: Path, field: str) -> Iterator[str]:
    for number, row in enumerate(_table(path, field), 1):
        try:
            text = of_row(row, field)
        except MISSING:
            raise UserError(
                f"{path}, row {number} has no string `{field}`: {quoted(row)[:80]}{_other(field)}"
            ) from None
        yield text


def _table(path: Path, field: str) -> Iterator[Any]:
    """The rows; of the column that has the field alone, if there is one."""
    try:  # optional
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"reading {path} takes pyarrow: pip install 'gptjax[data]'") from None
    try:
        with _open(path) as file:
            for batch in _batches(pyarrow, parquet, file, ending(path), field):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _batches(pyarrow: Any, parquet: Any, file: BinaryIO, suffix: str, field: str) -> Iterator[Any]:
    """Of the column that has the field; of all, if there is none."""
    column = field.split(".")[0]
    if suffix == ".parquet":
        table = parquet.ParquetFile(file)
        columns = [name for name in (field, column) if name in table.schema_arrow.names][:1]
        yield from table.iter_batches(ROWS, columns=columns or None)
        return
    content = pyarrow.PythonFile(file, mode="r")
    try:
        table = pyarrow.ipc.open_file(content)
    except pyarrow.ArrowInvalid:  # a stream, as `datasets` writes
        file.seek(0)
        batches = iter(pyarrow.ipc.open_stream(content))
    else:
        batches = map(table.get_batch, range(table.num_record_batches))
    for batch in batches:
        columns = [name for name in (field, column) if name in batch.schema.names][:1]
        batch = batch.select(columns) if columns else batch
        for start in range(0, batch.num_rows, ROWS):
            yield batch.slice(start, ROWS)


def _other(field: str) -> str:
    return " (--data.text-field names another field)" if field == "text" else ""


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
