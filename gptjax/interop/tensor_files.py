"""Files of tensors: safetensors, PyTorch's own, Flax's; read without running anything in them."""

import collections
import importlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict

from gptjax.errors import UserError, first_line
from gptjax.files import parse_json, read_json
from gptjax.interop.parameter_names import NAMES_LISTED

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
FLAX = "flax_model.msgpack"


def hugging_face_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The weights in a Hugging Face folder: model.safetensors, else pytorch_model.bin, else
    flax_model.msgpack, each in one file or sharded with an index. UserError: there are none, they
    are damaged, or an index does not fit its files."""
    for name, read in ((SAFETENSORS, read_safetensors), (PYTORCH, read_torch), (FLAX, read_flax)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            weight_map = _weight_map(index)
            parts = [read(folder / file) for file in sorted(set(weight_map.values()))]
            found = collections.Counter(tensor for part in parts for tensor in part)
            names = (_from_flax(key.split("/")) if name == FLAX else key for key in weight_map)
            expected = collections.Counter(names)
            if odd := sorted((found - expected) | (expected - found)):  # one in two files, too
                listed = ", ".join(odd[:NAMES_LISTED])
                raise UserError(f"{index} and its files name different tensors: {listed}")
            return {tensor: array for part in parts for tensor, array in part.items()}
    raise UserError(
        f"{folder} holds no weights: expected {SAFETENSORS}, {SAFETENSORS}.index.json, {PYTORCH} or"
        f" {FLAX}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the name of its file, which is there, in the index's own folder."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} is damaged: expected an object `weight_map` of file names")
    present = {path.name for path in index.parent.iterdir() if path.is_file()}
    for name in sorted(set(found.values()) - present):
        raise UserError(f"{index} names {name}, which is not a file beside it")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError: it cannot be read or holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file. UserError: it is missing, truncated or damaged, or has a
    type of number that numpy does not have."""
    try:
        # Not mapped into memory: pages of a map count as ours until it is closed.
        with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    with path.open("rb") as header:  # the library keeps the last of two equal names
        parse_json(header.read(int.from_bytes(header.read(8), "little")).decode(), str(path))
    return found


def read_flax(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a flax_model.msgpack, as transformers wrote it until version 5, by the names
    and in the layout of its PyTorch files. UserError: it cannot be read, or is damaged."""
    try:
        tree = flatten_dict(flax.serialization.msgpack_restore(path.read_bytes()))
        found = {}
        for names, array in tree.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{names[-1]!r} is no array")
            # Its Conv1D stores [out, in], its head is a linear layer of Flax, [in, out].
            found[_from_flax(names)] = array.T if names[-1] == "kernel" else array
    except Exception as error:  # a damaged file fails in many ways; none of them is a bug of ours
        raise UserError(f"cannot read {path} as Flax's: {first_line(error)}") from None
    return found


def _from_flax(names: Sequence[str]) -> str:
    """PyTorch's name of a parameter that Flax has under these."""
    *path, last = names
    return ".".join((*path, "bias" if last == "bias" else "weight"))


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote. UserError: as `load_torch_file` and
    `torch_tensors`."""
    return torch_tensors(load_torch_file(path), str(path))


def torch_tensors(named: Any, where: str) -> dict[str, np.ndarray]:
    """A dict of PyTorch tensors as arrays, which share their memory (but for bfloat16). UserError:
    `named` is none, or not all of the tensors are plain arrays."""
    torch, found = optional("torch", "reading PyTorch's own files"), {}
    # Not by its own methods: a file may overwrite those of an OrderedDict.
    items: Any = dict.items(named) if isinstance(named, dict) else [(None, None)]
    for name, tensor in items:
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            raise UserError(f"{where} does not hold named tensors")
        try:
            # Strides of 0 make a tensor of any size out of one number.
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise ValueError
            # numpy has no bfloat16; float32 holds each of its values.
            plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            found[name] = plain.detach().numpy()
        except (ValueError, TypeError, RuntimeError):  # nested, sparse, not here, of an 8-bit type
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise UserError(f"{where}: {name} is not a plain array ({kind})") from None
    return found


def load_torch_file(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """The content of a file written by torch.save, if it is plain data: no code in it is run.
    `stand_ins`: (a class that does nothing, whose objects take the place of those of this name).
    UserError: the file cannot be read, is damaged, or would import or run code."""
    torch = optional("torch", "reading PyTorch's own files")
    try:
        # torch.save does not compress; a small file may claim terabytes of zeros.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                    raise ValueError("its parts are larger than the file")
        allowed: Any = [*stand_ins]
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # torch guesses at what a damaged file may be
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways; none of them is a bug of ours
        what = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # whose own message advises to run it
            asks = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it asks for {asks[1]}" if asks else "torch.save did not write it"
        raise UserError(
            f"{path} cannot be read as tensors and plain values ({what}); it was not run"
        ) from None


def optional(name: str, purpose: str, install: str = "-r requirements-torch.txt") -> Any:
    """torch, transformers or gguf. UserError: it is not installed; `purpose` needs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{purpose} needs {name}: pip install {install}") from None
