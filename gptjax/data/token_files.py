"""Opening a prepared data set: a folder, on a disk or in a bucket, with train.bin and val.bin, or
shards of them (token ids as raw little-endian uint16, or uint32 for a large vocabulary), meta.json
and tokenizer.json; or nanoGPT's, where meta.pkl stands for the last two; or llm.c's (and
modded-nanogpt's), of files that begin with a header."""

import bisect
import dataclasses
import errno
import hashlib
import io
import itertools
import pickle
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax import files
from gptjax.data import tokenizers
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer, Tokenizer
from gptjax.errors import RunError, UserError, first_line

SPLITS = ("train", "val")

FINGERPRINT_BYTES = 64 << 20
"""A fingerprint reads at most this much of a split, in evenly spaced blocks."""
FINGERPRINT_BLOCK = 1 << 20
LLM_C = re.compile(r".+_(train|val)(?:_\d+)?\.bin")
"""Names of llm.c's files, such as fineweb_train_000001.bin."""
HEADER_BYTES = 1024
"""What they begin with: int32 20240520, version 1, the number of uint16 tokens that follow."""

READ_AT_ONCE = 16
"""Blocks that are in memory at the same time."""


class Split:
    """Tokens that lie in files, one after the other, and are read when they are asked for. Not a
    memory map: if somebody truncates a file, that kills the process without a message."""

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype, skipped: int = 0
    ):
        """`counts`: the tokens in each file, after `skipped` bytes. Raises OSError."""
        self.dtype, self._files, self._skipped = dtype, files.Ranges(paths), skipped
        self._starts = [0, *itertools.accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises as `read`."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read one after the other, not in steps of {step}")
        return self.read([(start, stop)])[0]

    def read(self, parts: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Tokens [start, stop) of each part, read-only. From a bucket, all are asked for at once.
        Raises RunError if a file cannot be read, or is shorter than when it was opened."""
        pieces = [list(self._pieces(start, stop)) for start, stop in parts]
        wanted = [*itertools.chain(*pieces)]
        try:
            contents = self._files.read(wanted)
        except OSError as error:
            raise RunError(
                f"cannot read {error.filename or self._files.paths[0].parent}: {error.strerror};"
                " resume when it can be read again"
            ) from None
        for (number, start, stop), content in zip(wanted, contents, strict=True):
            if len(content) < stop - start:
                raise RunError(
                    f"{self._files.paths[number]} is shorter than when it was opened; restore it or"
                    " prepare it again, and resume"
                )
        found = (np.frombuffer(content, self.dtype) for content in contents)
        rows = [[*itertools.islice(found, len(each))] for each in pieces]
        nothing = np.zeros(0, self.dtype)
        return [row[0] if len(row) == 1 else np.concatenate([nothing, *row]) for row in rows]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(which file, first byte, end) of all that these tokens lie in."""
        number, size = bisect.bisect_right(self._starts, start) - 1, self.dtype.itemsize
        skipped = self._skipped
        while start < stop:
            begin, end = self._starts[number], min(stop, self._starts[number + 1])
            yield number, skipped + (start - begin) * size, skipped + (end - begin) * size
            start, number = end, number + 1


def file_name(split: str, shard: int | None) -> str:
    """Of a split, or of one shard of it."""
    return f"{split}.bin" if shard is None else f"{split}-{shard:05d}.bin"


def _files_of(split: str, n_tokens: int, shard_tokens: int | None) -> Iterator[tuple[str, int]]:
    """(name, tokens in it) of each file; of shards all have `shard_tokens` but the last."""
    size = shard_tokens or max(1, n_tokens)
    for shard, start in enumerate(range(0, max(1, n_tokens), size)):
        name = file_name(split, shard if shard_tokens else None)
        yield name, min(size, n_tokens - start)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared set."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    fingerprint: str
    """Of the tokens, wherever they lie: SHA-256 of each split's length and (a sample of) bytes."""
    source: str | None = None
    """What it was made from, as `DataConfig.source`; None where that is not known."""
    parts: tuple[tuple[str, int], ...] = ()
    """Of a mix: (source, training tokens) of each text, in the order in which they lie there."""


def load(folder: Path) -> Dataset:
    """Open a prepared set, or nanoGPT's (without running what its meta.pkl may contain), or
    llm.c's.

    Raises UserError if files are missing, damaged, of another length than recorded, or hold token
    ids that the tokenizer does not have, or cannot be read.
    """
    sizes = files.sizes(folder)
    nanogpts = {f"{split}.bin" for split in SPLITS} <= {*sizes}
    if not ("meta.json" in sizes or nanogpts or any(map(LLM_C.fullmatch, sizes))):
        raise UserError(
            f"{folder} is not a prepared data set: expected meta.json, train.bin and val.bin in it"
            " (python -m gptjax data SOURCE --out FOLDER makes one)"
        )
    with files.readable(folder):
        return _load(folder, sizes)


def _load(folder: Path, sizes: dict[str, int]) -> Dataset:
    meta = _read_meta(folder) if "meta.json" in sizes else {}
    headers = {} if meta or "train.bin" in sizes else _read_headers(folder, sizes)
    # nanoGPT's sets without a meta.pkl hold GPT-2's tokens; so do all of llm.c's.
    tokenizer = read_tokenizer(folder) or Gpt2Tokenizer()
    recorded = "uint16" if headers else meta.get("dtype") or _unrecorded_dtype(folder, sizes)
    dtype = np.dtype(recorded).newbyteorder("<")
    skipped = HEADER_BYTES if headers else 0
    digest, splits = hashlib.sha256(), list[Split]()
    for split in SPLITS:
        # Of nanoGPT's sets the length is not recorded. One token is nothing to predict.
        unrecorded = sizes.get(f"{split}.bin", 0) // dtype.itemsize
        n_tokens = meta.get(f"{split}_tokens", unrecorded)
        # There may be no text for validation.
        n_tokens = n_tokens if n_tokens == 0 and split == "val" else max(2, n_tokens)
        paths, counts = list[Path](), list[int]()
        ours = _files_of(split, n_tokens, meta.get("shard_tokens"))
        for name, expected in headers[split] if headers else ours:
            paths.append(folder / name)
            counts.append(expected)
            if name not in sizes:
                raise UserError(f"{paths[-1]} is missing; copy it again or prepare the set again")
            if sizes[name] != skipped + expected * dtype.itemsize:
                raise UserError(
                    f"{paths[-1]} is damaged or was replaced: it has {sizes[name]:,} bytes, not"
                    f" {expected:,} {dtype.name} tokens; prepare it again"
                )
        try:
            tokens = Split(paths, counts, dtype, skipped)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise UserError(
                f"{folder} has {len(counts):,} shards, more than files may be open; allow more"
                " (ulimit -n), or prepare it with larger --shard-tokens"
            ) from None
        largest = _digest_sample(tokens, digest)
        if largest >= tokenizer.n_vocab:
            raise UserError(
                f"the {split} split of {folder} holds token id {largest}, but its"
                f" {tokenizer.kind} tokenizer has {tokenizer.n_vocab} ids"
            )
        splits.append(tokens)
    train, val = splits
    source = meta.get("source")
    source = source if isinstance(source, str) else None
    parts = tuple((name, count) for name, count in meta.get("parts", ()))
    return Dataset(train, val, tokenizer, digest.hexdigest(), source, parts)


def _read_headers(folder: Path, sizes: dict[str, int]) -> dict[str, list[tuple[str, int]]]:
    """{split: [(name of llm.c's file, tokens in it)]}."""
    names = [name for name in sorted(sizes) if LLM_C.fullmatch(name)]
    heads = files.Ranges([folder / name for name in names]).read(
        [(number, 0, HEADER_BYTES) for number in range(len(names))]
    )
    found: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for name, head in zip(names, heads, strict=True):
        magic, version, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
        if (magic, version) != (20240520, 1) or count <= 0:
            raise UserError(
                f"{folder / name} does not begin as llm.c's files of GPT-2's tokens do: with the"
                " numbers 20240520, 1 and that of its tokens"
            )
        split = LLM_C.fullmatch(name)
        assert split
        found[split[1]].append((name, count))
    if not found["train"]:
        raise UserError(
            f"{folder} has no file for training; llm.c calls them NAME_train_000001.bin"
        )
    return found


def _unrecorded_dtype(folder: Path, sizes: dict[str, int]) -> str:
    """uint16 is nanoGPT's; of tokens that somebody wrote as uint32 every second half is 0."""
    halves = Split([folder / "val.bin"], [sizes["val.bin"] // 2], np.dtype("<u2"))[: 1 << 16]
    return "uint32" if len(halves) > 32 and halves.any() and not halves[1::2].any() else "uint16"


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    meta = files.read_json(path)
    fields = meta if isinstance(meta, dict) else {}
    counts = {type(fields.get(f"{split}_tokens")) for split in SPLITS}
    shard_tokens = fields.get("shard_tokens", 1)
    whole = counts == {int} and type(shard_tokens) is int and shard_tokens > 0
    whole = whole and (folder / "tokenizer.json").is_file()
    parts = fields.get("parts", [])
    whole = whole and isinstance(parts, list) and all(
        isinstance(part, list) and [*map(type, part)] == [str, int] and part[1] >= 0
        for part in parts
    )  # fmt: skip
    whole = whole and (not parts or sum(part[1] for part in parts) == fields["train_tokens"])
    if not whole or fields.get("dtype") not in ("uint16", "uint32"):
        raise UserError(
            f"{path} is damaged: expected dtype uint16 or uint32, whole numbers train_tokens and"
            " val_tokens (and shard_tokens, if there are shards), and a tokenizer.json beside it;"
            " prepare the set again"
        )
    return fields


def _digest_sample(tokens: Split, digest: Any) -> int:
    """Feed a split's length and evenly spaced blocks (all of a small split) to `digest`; the
    largest id among them."""
    block = FINGERPRINT_BLOCK // tokens.dtype.itemsize
    count = max(1, min(-(-len(tokens) // block), FINGERPRINT_BYTES // FINGERPRINT_BLOCK))
    digest.update(len(tokens).to_bytes(8, "little"))
    largest = 0
    starts = np.linspace(0, max(0, len(tokens) - block), count).astype(np.int64).tolist()
    for i in range(0, count, READ_AT_ONCE):
        some = starts[i : i + READ_AT_ONCE]
        for part in tokens.read([(start, min(start + block, len(tokens))) for start in some]):
            digest.update(part.tobytes())
            largest = max(largest, int(part.max(initial=0)))
    return largest


class PlainUnpickler(pickle._Unpickler):
    """Reads dicts, lists, strings and numbers. Refuses to import anything, and so to run anything.

    Python's own implementation, because the one in C allocates memory for any memo index that a
    file names. Nested tuples would overflow the stack when hashed, and a bytearray allocates
    whatever size it claims: both are refused.
    """

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds more than dicts, lists, strings and numbers")

    REFUSED = pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.BYTEARRAY8
    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | dict.fromkeys(REFUSED, _refuse)

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder with our tokenizer.json or nanoGPT's meta.pkl (`itos`: id ->
    character); None if it has neither. Raises UserError if the file is damaged, or would run code.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        state = files.read_json(path)
        # Hugging Face's file of this name has the model as an object.
        foreign = isinstance(state, dict) and isinstance(state.get("model"), dict)
        return None if foreign else tokenizers.from_state(state, str(path))
    path = folder / "meta.pkl"
    if not path.is_file():
        return None
    try:
        # From memory, where a string cannot claim to be longer than the file.
        itos = PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if not all(isinstance(char, str) and len(char) == 1 for char in characters):
            raise ValueError("its tokens are not single characters")
        return CharTokenizer("".join(characters))
    except Exception as error:  # a hostile pickle can raise anything
        raise UserError(f"{path} is not nanoGPT's plain meta.pkl: {first_line(error)}") from None
