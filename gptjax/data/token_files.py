"""Opening a prepared data set: a folder with train.bin and val.bin (token ids as raw little-endian
uint16, or uint32 for a large vocabulary), meta.json and tokenizer.json; or nanoGPT's, where
meta.pkl stands for the last two."""

import dataclasses
import hashlib
import io
import os
import pickle
import weakref
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


class TokenFile:
    """The tokens of a .bin file, read when they are asked for. Not a memory map: if somebody
    truncates the file, that kills the process without a message."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self._length = os.fstat(self._file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises RunError if the file cannot be read, or is shorter than when it was opened."""
        start, stop, _ = part.indices(self._length)
        self._file.seek(start * self.dtype.itemsize)
        found = np.fromfile(self._file, self.dtype, max(0, stop - start))
        if len(found) < stop - start:
            raise RunError(
                f"{self.path} is shorter than when it was opened, or cannot be read; restore it or"
                " prepare it again, and resume"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared set."""

    train: TokenFile
    val: TokenFile
    tokenizer: Tokenizer
    fingerprint: str
    """Of the tokens, wherever they lie: SHA-256 of each split's length and (a sample of) bytes."""
    source: str | None = None
    """What it was made from, as `DataConfig.source`; None where that is not known."""


def load(folder: Path) -> Dataset:
    """Open a prepared set, or nanoGPT's (without running what its meta.pkl may contain).

    Raises UserError if files are missing, damaged, of another length than recorded, or hold token
    ids that the tokenizer does not have.
    """
    if files.is_remote(folder) or not all((folder / f"{s}.bin").is_file() for s in SPLITS):
        raise UserError(
            f"{folder} is not a prepared data set on this machine's disk: expected train.bin and"
            " val.bin in it (python -m gptjax data SOURCE --out FOLDER makes one)"
        )
    meta = _read_meta(folder) if (folder / "meta.json").is_file() else {}
    # nanoGPT's sets without a meta.pkl hold GPT-2's tokens.
    tokenizer = read_tokenizer(folder) or Gpt2Tokenizer()
    dtype = np.dtype(meta.get("dtype") or _unrecorded_dtype(folder)).newbyteorder("<")
    digest, splits = hashlib.sha256(), list[TokenFile]()
    for split in SPLITS:
        path = folder / f"{split}.bin"
        size, tokens = path.stat().st_size, TokenFile(path, dtype)
        # Of nanoGPT's sets the length is not recorded. One token is nothing to predict.
        expected = max(2, meta.get(f"{split}_tokens", len(tokens)))
        if size != expected * dtype.itemsize:
            raise UserError(
                f"{path} is damaged or was replaced: it has {size:,} bytes, not {expected:,}"
                f" {dtype.name} tokens; prepare it again"
            )
        largest = _digest_sample(tokens, digest)
        if largest >= tokenizer.n_vocab:
            raise UserError(
                f"{path} holds token id {largest}, but its {tokenizer.kind} tokenizer has"
                f" {tokenizer.n_vocab} ids"
            )
        splits.append(tokens)
    train, val = splits
    source = meta.get("source")
    source = source if isinstance(source, str) else None
    return Dataset(train, val, tokenizer, digest.hexdigest(), source)


def _unrecorded_dtype(folder: Path) -> str:
    """uint16 is nanoGPT's; of tokens that somebody wrote as uint32 every second half is 0."""
    halves = np.fromfile(folder / "val.bin", "<u2", 1 << 16)
    return "uint32" if len(halves) > 32 and halves.any() and not halves[1::2].any() else "uint16"


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    meta = files.read_json(path)
    fields = meta if isinstance(meta, dict) else {}
    counts = {type(fields.get(f"{split}_tokens")) for split in SPLITS}
    whole = counts == {int} and (folder / "tokenizer.json").is_file()
    if not whole or fields.get("dtype") not in ("uint16", "uint32"):
        raise UserError(
            f"{path} is damaged: expected dtype uint16 or uint32, whole numbers train_tokens and"
            " val_tokens, and a tokenizer.json beside it; prepare the set again"
        )
    return fields


def _digest_sample(tokens: TokenFile, digest: Any) -> int:
    """Feed a split's length and evenly spaced blocks (all of a small split) to `digest`; the
    largest id among them."""
    block = FINGERPRINT_BLOCK // tokens.dtype.itemsize
    count = max(1, min(-(-len(tokens) // block), FINGERPRINT_BYTES // FINGERPRINT_BLOCK))
    digest.update(len(tokens).to_bytes(8, "little"))
    largest = 0
    for start in np.linspace(0, max(0, len(tokens) - block), count).astype(np.int64):
        part = tokens[start : start + block]
        digest.update(part.tobytes())
        largest = max(largest, int(part.max()))
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
