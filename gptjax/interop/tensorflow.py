"""GPT-2 as OpenAI released it: a TensorFlow checkpoint beside hparams.json. Needs no TensorFlow.

A checkpoint is a table of what its tensors are (NAME.index) and their bytes one after the other
(NAME.data-...). The table is one of LevelDB's, uncompressed; its values are protocol buffers.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.config import FINETUNE
from gptjax.errors import UserError
from gptjax.interop import parameter_names
from gptjax.interop.tensor_files import read_object
from gptjax.interop.weights import Weights, model_config

HPARAMS = "hparams.json"

SIZES = {
    "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
    "n_ctx": "block_size", "n_vocab": "vocab_size",
}  # fmt: skip
"""Their settings -> ours."""

DTYPES: dict[int, Any] = {1: np.float32, 19: np.float16, 14: ml_dtypes.bfloat16}
"""By TensorFlow's numbers."""

MAGIC = bytes.fromhex("57fb808b247547db")
"""The last bytes of a table."""
FOOTER = 48

_TENSOR = re.compile(r"model/(?:h(\d+)/)?([\w/]+?)(?:/([wgb]))?")


def read(folder: Path) -> Weights:
    """The GPT-2 in a folder. UserError: files are missing or damaged, or tensors do not fit."""
    where = str(folder / HPARAMS)
    hparams = read_object(folder / HPARAMS)
    if missing := [name for name in SIZES if name not in hparams]:
        raise UserError(f"{where} is not OpenAI's: it lacks {', '.join(missing)}")
    model = model_config({ours: hparams[name] for name, ours in SIZES.items()}, where)
    index = _index(folder)
    params = parameter_names.from_torch(read_tensors(index), model, "in_out", str(index))
    return Weights(FINETUNE.replace(model=model), params)


def _index(folder: Path) -> Path:
    """The newest checkpoint, which the file `checkpoint` names, or the only one."""
    found = sorted(folder.glob("*.index"))
    named = folder / "checkpoint"
    if len(found) != 1 and named.is_file():
        text = named.read_text(errors="replace")
        newest = re.search(r'^model_checkpoint_path: "(?:.*/)?([^/"]+)"', text, re.MULTILINE)
        found = [path for path in found if newest and path.name == f"{newest[1]}.index"]
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} checkpoints of TensorFlow (NAME.index); expected one, or"
            " a file `checkpoint` that names one of them"
        )
    return found[0]


def read_tensors(index: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, named as Hugging Face's. UserError: it is damaged, or holds
    others."""
    try:
        return _read_tensors(index)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or index}: {error.strerror}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise UserError(f"{index} is damaged, or no checkpoint of TensorFlow ({error})") from None


def _read_tensors(index: Path) -> dict[str, np.ndarray]:
    entries = dict(_table(index.read_bytes()))
    header = _fields(entries.pop(b""))
    shards = _number(header, 1)
    if _number(header, 2):
        raise ValueError("its numbers are big-endian")
    found = {}
    for key, value in entries.items():
        match = _TENSOR.fullmatch(key.decode())
        # An optimizer's variables are no part of the model.
        if not match or match[2].rpartition("/")[2].startswith("Adam"):
            continue
        entry = _fields(value)
        dtype = np.dtype(DTYPES[_number(entry, 1)])
        dims = _fields(entry.get(2, [b""])[0]).get(2, [])
        shape = [_number(_fields(dim), 1) for dim in dims]
        offset, size = _number(entry, 4), _number(entry, 5)
        data = index.with_suffix(f".data-{_number(entry, 3):05}-of-{shards:05}")
        count = np.prod(shape, dtype=object)
        if count * dtype.itemsize != size or offset + size > data.stat().st_size:
            raise ValueError(f"the size of {key.decode()}")
        array = np.fromfile(data, dtype, count, offset=offset).reshape(shape)
        layer, name, part = match.groups()
        if part == "w":
            array = array.reshape(array.shape[-2:])  # of a convolution of width 1
        prefix = f"h.{layer}." if layer else ""
        kind = "bias" if part == "b" else "weight"
        found[f"{prefix}{name.replace('/', '.')}.{kind}"] = array
    return found


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table of LevelDB's."""
    if data[-len(MAGIC) :] != MAGIC:
        raise ValueError("it does not end as a table")
    footer, at = data[-FOOTER:], 0
    _, at = _handle(footer, at)  # of what is not used here
    handle, _ = _handle(footer, at)
    for _, value in _block(data, *handle):
        yield from _block(data, *_handle(value, 0)[0])


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """A key begins with the start of the key before it, whose length is given."""
    block, compression = data[offset : offset + size], data[offset + size]
    if compression or len(block) < size:
        raise ValueError("a block is compressed" if compression else "a block is cut off")
    (restarts,) = struct.unpack("<I", block[-4:])
    at, end, key = 0, len(block) - 4 * (restarts + 1), b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size) of a block, where what follows begins)."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(a number, where what follows begins): seven bits a byte, the lowest first."""
    for length in range(1, 11):
        if data[at + length - 1] < 0x80:
            parts = data[at : at + length]
            return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(parts)), at + length
    raise ValueError("a number is too long")


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The values of a protocol buffer by the numbers of its fields, unread if they are messages."""
    out: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: Any
        if tag & 7 == 0:
            value, at = _varint(message, at)
        elif tag & 7 == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif tag & 7 in (1, 5):
            value, at = None, at + (8 if tag & 7 == 1 else 4)  # checksums
        else:
            raise ValueError("an entry is no protocol buffer")
        out.setdefault(tag >> 3, []).append(value)
    return out


def _number(fields: dict[int, list[Any]], number: int) -> int:
    """A field that is left out is 0."""
    value = fields.get(number, [0])[-1]
    if type(value) is not int:
        raise ValueError("an entry has a field of another type")
    return value
