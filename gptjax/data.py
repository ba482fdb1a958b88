"""Text into token files, and token files into batches. numpy only.

    python -m gptjax.data my.txt --tokenizer gpt2 --out data/mine

A prepared set is a folder: `train.bin` and `val.bin` (raw little-endian uint16, or uint32 where
the vocabulary needs it, as nanoGPT's), `meta.json` and `tokenizer.json`.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptjax import cli, tokenizers
from gptjax.config import DataConfig, TokenizerKind
from gptjax.corpus import find_files, read_documents
from gptjax.errors import RunError, UserError, first_line
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer

# sentencepiece learns from at most this many characters, taken evenly from the whole text.
SENTENCEPIECE_SAMPLE = 10_000_000
# Pieces (of about a megabyte) that are encoded at the same time.
IN_FLIGHT = min(8, 2 * (os.cpu_count() or 1))
# A fingerprint reads this many bytes at most, in evenly spaced blocks.
FINGERPRINT_BYTES = 64 << 20
FINGERPRINT_BLOCK = 1 << 20


# ------------------------------------------------------------------------------- prepare


def prepare(
    config: DataConfig, out: Path, console: Console, tokenizer: Tokenizer | None = None
) -> None:
    """Tokenise `config.source` into the new folder `out`, which appears only when it is whole;
    with `tokenizer`, or else with a new one of the kind that `config` names.

    Streams: memory stays within a few hundred megabytes whatever the size of the text.

    Raises:
        UserError: bad text, an existing `out`, a full disk, a vocabulary size that does not fit.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder or delete it")
    files = find_files(config.source)
    try:
        with made_whole(out) as folder:
            _prepare_into(folder, config, files, console, tokenizer)
    except OSError as error:
        if out.exists():
            return  # another process of this run has made the same set meanwhile
        raise RunError(f"cannot write {out}: {error.strerror}") from None


@contextlib.contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which takes its name when the block ends without an error and
    goes away otherwise; those that killed processes have left go too. OSError where it cannot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with _held(out.parent):  # nobody looks for leftovers while another one begins
            for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
                with contextlib.suppress(OSError), _held(left, fcntl.LOCK_NB):
                    shutil.rmtree(left)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            held.callback(shutil.rmtree, unfinished, ignore_errors=True)
            held.enter_context(_held(unfinished))
        yield unfinished
        unfinished.chmod(0o755)
        os.rename(unfinished, out)


@contextlib.contextmanager
def _held(folder: Path, how: int = 0) -> Iterator[None]:
    """Locked, as long as this process lives; with LOCK_NB, OSError where another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        except OSError:  # without LOCK_NB: a network file system that has no locks
            if how:
                raise
        yield
    finally:
        os.close(descriptor)


def _prepare_into(
    folder: Path,
    config: DataConfig,
    files: list[Path],
    console: Console,
    given: Tokenizer | None,
) -> None:
    size = sum(path.stat().st_size for path in files)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        reading = progress.add_task("reading the text", total=size)
        kind = given.kind if given else config.tokenizer
        joint = "\n" if kind == "char" else None
        count, tokenizer = _survey(
            config, files, size, lambda n: progress.advance(reading, n), joint, given
        )
        progress.update(reading, completed=size)
        n_train = int(count * (1 - config.val_fraction))
        dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
        work = progress.add_task(f"tokenising ({tokenizer.kind})", total=count)

        tokens = {"train": 0, "val": 0}
        with (
            (folder / "train.bin").open("wb") as train,
            (folder / "val.bin").open("wb") as val,
        ):
            sinks = {"train": train, "val": val}
            todo = _split(_pieces(files, joint), n_train)
            for split, done, ids in _encode_in_order(todo, tokenizer):
                sinks[split].write(ids.astype(dtype).tobytes())
                tokens[split] += len(ids)
                progress.advance(work, done)
            for sink in sinks.values():
                sink.flush()
                os.fsync(sink.fileno())
    if min(tokens.values()) < 2:
        raise UserError(
            f"{config.source} gives {tokens['train']} training and {tokens['val']} validation"
            " tokens; expected at least 2 of each: use more text or another val_fraction"
        )
    meta = {
        "source": config.source,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "dtype": dtype.name,
        "characters": count,
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
    }
    (folder / "tokenizer.json").write_text(tokenizers.to_json(tokenizer))
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    console.print(
        f"prepared {count:,} characters of {config.source} as {tokens['train']:,} training and"
        f" {tokens['val']:,} validation tokens ({tokenizer.kind}, {tokenizer.n_vocab:,} ids)",
        highlight=False,
        soft_wrap=True,
    )


def _pieces(files: list[Path], joint: str | None) -> Iterator[str | None]:
    """The text of all files; between documents stands `joint` (None: the end-of-text token)."""
    for number, document in enumerate(read_documents(files)):
        if number:
            yield joint
        yield from document


def _survey(
    config: DataConfig,
    files: list[Path],
    size: int,
    advance: Callable[[int], None],
    joint: str | None,
    given: Tokenizer | None = None,
) -> tuple[int, Tokenizer]:
    """Read everything once: (characters, the given tokenizer or the one this text needs)."""
    count, alphabet, sample = 0, set[str](), list[str]()
    # Of each piece its share from its beginning, so that every part of the text is heard; short
    # pieces whole, every so often.
    share, owed = min(1.0, SENTENCEPIECE_SAMPLE / max(1, size)), 0.0
    for piece in _pieces(files, joint):
        if piece is None:
            continue
        count += len(piece)
        advance(len(piece))
        if given:
            continue
        if config.tokenizer == "char":
            alphabet.update(piece)
        elif config.tokenizer == "sentencepiece":
            owed += len(piece) * share
            if owed >= min(len(piece), 1000):
                sample.append(piece[: math.ceil(owed)])
                owed -= len(sample[-1])
    if given:
        return count, given
    if config.tokenizer == "char":
        return count, CharTokenizer("".join(sorted(alphabet)))
    if config.tokenizer == "gpt2":
        return count, Gpt2Tokenizer()
    return count, SentencePieceTokenizer.train(sample, config.sentencepiece_vocab_size)


def _split(pieces: Iterator[str | None], n_train: int) -> Iterator[tuple[str, str | None]]:
    """(split, piece): the first `n_train` characters are for training, as in nanoGPT."""
    for piece in pieces:
        if piece is None or len(piece) <= n_train or n_train <= 0:
            yield ("train" if n_train > 0 else "val"), piece
        else:
            yield "train", piece[:n_train]
            yield "val", piece[n_train:]
        n_train -= len(piece or "")


def _encode_in_order(
    todo: Iterator[tuple[str, str | None]], tokenizer: Tokenizer
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(split, characters, ids) in order, encoded on all cores; tiktoken and sentencepiece
    release Python's lock."""

    def encode(split: str, piece: str | None) -> tuple[str, int, np.ndarray]:
        if piece is None:
            return split, 0, np.array([tokenizer.eot], dtype=np.int32)
        return split, len(piece), tokenizer.encode(piece)

    waiting: deque[Future[tuple[str, int, np.ndarray]]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for split, piece in todo:
            waiting.append(pool.submit(encode, split, piece))
            if len(waiting) > IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def default_name(config: DataConfig) -> str:
    """NAME-TOKENIZER, the readable part of `default_dir`."""
    name = f"{Path(config.source or '').stem or 'text'}-{config.tokenizer}"
    if config.tokenizer == "sentencepiece":
        name += str(config.sentencepiece_vocab_size)
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def default_dir(config: DataConfig, tokenizer: Tokenizer | None = None) -> Path:
    """data/NAME-TOKENIZER-DIGEST: a changed text, setting or given tokenizer gets a folder of its
    own."""
    files = find_files(config.source)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    asked: list[Any] = [config.tokenizer, config.val_fraction, stats]
    if tokenizer:
        asked.append(tokenizer.state())
    elif config.tokenizer == "sentencepiece":
        asked.append(config.sentencepiece_vocab_size)
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    return Path("data") / f"{default_name(config)}-{digest}"


def is_made_with(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a prepared set is there that this very tokenizer made."""
    there = folder.is_dir() and read_tokenizer(folder)
    return bool(there and there.state() == tokenizer.state())


# ---------------------------------------------------------------------------------- load


class TokenFile:
    """The tokens of a .bin file. Slices are read when they are asked for. (A memory map would do as
    well, until somebody cuts the file short: then it kills the process, without a word.)"""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file = path.open("rb")
        self._length = os.fstat(self._file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises RunError where the file cannot be read, or is shorter than when it was opened."""
        start, stop, _ = part.indices(self._length)
        size = max(0, stop - start) * self.dtype.itemsize
        at, pieces = start * self.dtype.itemsize, list[bytes]()
        try:
            # The system may give less at a time than it is asked for.
            while size and (piece := os.pread(self._file.fileno(), size, at)):
                pieces.append(piece)
                at, size = at + len(piece), size - len(piece)
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror}") from None
        if size:
            raise RunError(
                f"{self.path} is shorter than when it was opened; restore it or prepare it again,"
                " and resume"
            )
        return np.frombuffer(b"".join(pieces), self.dtype)


Tokens = np.ndarray | TokenFile


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared set: its tokens, their tokenizer, and a fingerprint of their bytes."""

    train: TokenFile
    val: TokenFile
    tokenizer: Tokenizer
    fingerprint: str


def load(folder: Path) -> Dataset:
    """Open a prepared set, ours or nanoGPT's (its `meta.pkl` is read without running its code).

    Raises:
        UserError: parts are missing, damaged, shorter than recorded, or hold unknown token ids.
    """
    if not (folder / "train.bin").is_file() or not (folder / "val.bin").is_file():
        raise UserError(
            f"{folder} is not a prepared data set: expected train.bin and val.bin in it"
            " (python -m gptjax.data SOURCE --out FOLDER makes one)"
        )
    meta: dict[str, Any] = {}
    if (folder / "meta.json").is_file():
        meta = _read_meta(folder)
    # nanoGPT's sets without a meta.pkl hold GPT-2's tokens.
    tokenizer = read_tokenizer(folder) or Gpt2Tokenizer()
    splits = {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
        size = path.stat().st_size
        if size % dtype.itemsize or size == 0:
            raise UserError(f"{path} is damaged: {size} bytes are not whole {dtype.name} tokens")
        tokens = TokenFile(path, dtype)
        if len(tokens) != meta.get(f"{split}_tokens", len(tokens)):
            raise UserError(
                f"{path} holds {len(tokens):,} tokens, but meta.json says"
                f" {meta[f'{split}_tokens']:,}: it is damaged or was replaced; prepare it again"
            )
        if split == "val" and len(tokens) < 2:
            raise UserError(f"{path} holds one token; nothing can be predicted in it")
        splits[split] = tokens
    digest = hashlib.sha256()
    for split, tokens in splits.items():
        largest = _fingerprint(tokens, digest)
        if largest >= tokenizer.n_vocab:
            raise UserError(
                f"{folder / split}.bin holds token id {largest}, beyond the {tokenizer.n_vocab} ids"
                f" of its {tokenizer.kind} tokenizer"
            )
    return Dataset(splits["train"], splits["val"], tokenizer, digest.hexdigest())


def _read_meta(folder: Path) -> dict[str, Any]:
    where = folder / "meta.json"
    try:
        meta = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({error}); prepare it again") from None
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} is damaged: no tokenizer.json; prepare it again")
    if not isinstance(meta, dict) or meta.get("dtype") not in ("uint16", "uint32"):
        raise UserError(f"{where} is damaged: expected an object with dtype uint16 or uint32")
    if not all(isinstance(meta.get(f"{s}_tokens"), int) for s in ("train", "val")):
        raise UserError(f"{where} is damaged: expected whole numbers train_tokens and val_tokens")
    return meta


class _PlainUnpickler(pickle._Unpickler):
    """Reads plain dicts, lists, strings and numbers; refuses to import, and so to run, anything.

    Python's own, not the one in C, which sets memory aside for any place of its memo that a file
    names. Tuples in tuples would overflow the stack when hashed, a bytearray may be of any size.
    """

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds more than dicts, lists, strings and numbers")

    _ODD = pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.BYTEARRAY8
    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | dict.fromkeys(_ODD, _refuse)

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Of a folder with our tokenizer.json or nanoGPT's meta.pkl {vocab_size, itos, stoi}; None if
    it has neither.

    Raises:
        UserError: the file is damaged, or would run code.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
        # Hugging Face's file of this name has the model as an object.
        theirs = isinstance(found, dict) and isinstance(found.get("model"), dict)
        return None if theirs else tokenizers.from_state(found, str(path))
    path = folder / "meta.pkl"
    if not path.is_file():
        return None
    try:
        # In memory, where a string that claims to be longer than the file takes no room.
        itos = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if not all(isinstance(char, str) and len(char) == 1 for char in characters):
            raise ValueError("its tokens are not single characters")
        return CharTokenizer("".join(characters))
    except Exception as error:  # a pickle can fail in any way; none of them may pass
        raise UserError(f"{path} is not nanoGPT's plain meta.pkl: {first_line(error)}") from None


def _fingerprint(tokens: Tokens, digest: Any) -> int:
    """Feed the length and evenly spaced blocks (all of a small set) to `digest`; the largest id
    seen."""
    block = FINGERPRINT_BLOCK // tokens.dtype.itemsize
    blocks = max(1, min(-(-len(tokens) // block), FINGERPRINT_BYTES // FINGERPRINT_BLOCK))
    starts = np.linspace(0, max(0, len(tokens) - block), blocks).astype(np.int64)
    digest.update(len(tokens).to_bytes(8, "little"))
    largest = 0
    for start in starts:
        piece = np.asarray(tokens[start : start + block])
        digest.update(piece.tobytes())
        largest = max(largest, int(piece.max()))
    return largest


# ------------------------------------------------------------------------------- batches


def batch_at(
    tokens: Tokens,
    seed: int,
    step: int,
    *,
    batch_size: int,
    block_size: int,
    rows: slice = slice(None),
) -> np.ndarray:
    """int32 [batch_size, block_size + 1]: random windows, a pure function of (seed, step); of
    them only `rows` are read.

    Philox is counter-based (Salmon et al. 2011) and numpy keeps its raw stream fixed, so step
    1000 costs what step 0 does, and is the same on every machine and numpy version.
    """
    raw = np.random.Philox(key=seed, counter=step << 64).random_raw(batch_size)
    starts = (raw % np.uint64(len(tokens) - block_size)).astype(np.int64)[rows]
    return np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int32)


class Span(NamedTuple):
    """Tokens [first, end) are predicted from the window [start, end)."""

    start: int
    end: int
    first: int


def spans(
    n_tokens: int, block_size: int, *, stride: int | None = None, at_most: int | None = None
) -> list[Span]:
    """Windows of at most block_size + 1 tokens that predict every token but the first once.

    `stride` is the distance of two windows, in [1, block_size]; None: block_size, they do not
    overlap. Less gives all tokens but the first window's at least `block_size - stride` tokens of
    context. `at_most` takes so many evenly spaced ones, always the same.
    """
    out, first = [], 1
    for start in range(0, n_tokens - 1, stride or block_size):
        end = min(start + block_size + 1, n_tokens)
        if end > first:
            out.append(Span(start, end, first))
        first = end
    if at_most is None or at_most >= len(out):
        return out
    return [out[int(i)] for i in np.linspace(0, len(out) - 1, at_most)]


def windows_at(
    tokens: Tokens, some: Sequence[Span], block_size: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [rows, block_size + 1] windows and float32 [rows, block_size] weights: 1 for targets
    that a span predicts, 0 for its context, past its end, and in rows beyond the spans."""
    windows = np.zeros((rows, block_size + 1), dtype=np.int32)
    weights = np.zeros((rows, block_size), dtype=np.float32)
    for row, (start, end, first) in enumerate(some):
        windows[row, : end - start] = tokens[start:end]
        weights[row, first - start - 1 : end - start - 1] = 1
    return windows, weights


def check_ids(tokens: np.ndarray, vocab_size: int | None) -> None:
    """JAX clamps an index out of range, without a word.

    Raises:
        RunError: an id is beyond the vocabulary.
    """
    if tokens.max() >= (vocab_size or 0):
        raise RunError(
            f"the data hold token id {tokens.max()}, beyond the vocabulary of {vocab_size};"
            " the set is damaged, prepare it again"
        )


# ------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class PrepareFlags:
    """Tokenise a text into a folder that train_jax.py --data.dir reads."""

    tokenizer: TokenizerKind = DataConfig.tokenizer
    """char, gpt2 or sentencepiece."""
    sentencepiece_vocab_size: int = DataConfig.sentencepiece_vocab_size
    """Vocabulary of the sentencepiece model, in pieces."""
    val_fraction: float = DataConfig.val_fraction
    """Share of the text's characters, at its end, held out for validation, in (0, 1)."""
    out: str | None = None
    """The folder to make. None: data/ and a name made from the source."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        return self.config("builtin").problems()

    def config(self, source: str) -> DataConfig:
        """The same as part of a run's settings."""
        return DataConfig(source, self.tokenizer, self.sentencepiece_vocab_size, self.val_fraction)


def main(argv: list[str]) -> None:
    """`python -m gptjax.data SOURCE [flags]`."""
    named, flags = cli.parse(PrepareFlags(), argv, "python -m gptjax.data", "SOURCE")
    if not named:
        raise UserError("which text? python -m gptjax.data SOURCE (builtin, shakespeare, a path)")
    (source,) = named
    config = flags.config(source)
    if problems := config.problems():
        raise UserError("; ".join(problems))
    out = Path(flags.out) if flags.out else default_dir(config)
    prepare(config, out, Console())
    print(f"train on it: python train_jax.py --data.dir {shlex.quote(str(out))}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
