"""Files of tensors: safetensors, and PyTorch's own, read without running anything in them."""

import functools
import importlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from gptjax.errors import UserError, first_line
from gptjax.files import parse_json, read_json
from gptjax.interop.parameter_names import NAMES_LISTED, Stored

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"


def hugging_face_tensors(folder: Path) -> dict[str, Stored]:
    """The weights in a Hugging Face folder: model.safetensors, else pytorch_model.bin, each in one
    file or sharded with an index.

    Raises:
        UserError: there are none, they are damaged, or an index does not fit its files.
    """
    for name in (SAFETENSORS, PYTORCH):
        files, index = [folder / name], folder / f"{name}.index.json"
        weight_map = None
        if not files[0].is_file():
            if not index.is_file():
                continue
            weight_map = _weight_map(index)
            files = [folder / file for file in sorted(set(weight_map.values()))]
        found: dict[str, Stored] = {}
        for file in files:
            part = open_safetensors(file) if name == SAFETENSORS else open_torch(file)
            if twice := found.keys() & part.keys():
                raise UserError(f"{file} holds {min(twice)}, which is in another file too")
            found |= part
        if weight_map is not None and (odd := weight_map.keys() ^ found.keys()):
            listed = ", ".join(sorted(odd)[:NAMES_LISTED])
            raise UserError(f"{index} and its files name different tensors: {listed}")
        return found
    raise UserError(
        f"{folder} holds no weights: expected {SAFETENSORS}, {SAFETENSORS}.index.json or {PYTORCH}"
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


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file. UserError: it is missing, truncated or damaged."""
    try:
        # Not mapped into memory: pages of a map count as ours until it is closed.
        file = safetensors.safe_open(path, framework="numpy", backend="pread")
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    with path.open("rb") as header:  # the library keeps the last of two equal names
        parse_json(header.read(int.from_bytes(header.read(8), "little")).decode(), str(path))

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
            # The last two: a type of number that numpy does not have.
            raise UserError(f"cannot read {name} from {path}: {first_line(error)}") from None

    return {name: Stored(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def open_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a file that torch.save wrote. UserError: see `load_torch_file`."""
    return torch_tensors(load_torch_file(path), str(path))


def torch_tensors(named: Any, where: str) -> dict[str, Stored]:
    """A dict of PyTorch tensors; each is released when it has been read.

    Raises:
        UserError: `named` is none, or not all of the tensors are plain arrays.
    """
    torch = pytorch("reading PyTorch's own files")
    # Not by its own methods: a file may overwrite those of an OrderedDict.
    tensors: dict[str, Any] = dict(dict.items(named)) if isinstance(named, dict) else {"": None}
    if not all(isinstance(n, str) and torch.is_tensor(x) for n, x in tensors.items()):
        raise UserError(f"{where} does not hold named tensors")

    def shape(name: str) -> tuple[int, ...]:
        try:
            return tuple(tensors[name].shape)
        except RuntimeError:  # a nested tensor
            raise UserError(f"{where}: {name} is not a plain array") from None

    def read(name: str) -> np.ndarray:
        tensor = tensors.pop(name).detach()
        try:
            # Strides of 0 make a tensor of any size out of one number.
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise UserError(f"{where}: {name} has fewer values than its shape says")
            # numpy has no bfloat16; float32 holds each of its values.
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        except (TypeError, RuntimeError):  # sparse, on another device, of an 8-bit type
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise UserError(f"{where}: {name} is not a plain array ({kind})") from None

    return {name: Stored(shape(name), functools.partial(read, name)) for name in tensors}


def load_torch_file(path: Path) -> Any:
    """The content of a file written by torch.save, if it is plain data: no code in it is run.

    Raises:
        UserError: the file cannot be read, is damaged, or would import or run code.
    """
    torch = pytorch("reading PyTorch's own files")
    try:
        with path.open("rb"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch guesses at what a damaged file may be
            # torch.save does not compress; a small file may claim terabytes of zeros.
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as parts:
                    if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                        raise ValueError("its parts are larger than the file")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asks = re.search(r"GLOBAL (\S+)", str(error))
        # PyTorch's own message advises to run it all the same.
        what = f"it asks for {asks[1]}" if asks else "torch.save did not write it"
        raise UserError(
            f"{path} is damaged or holds more than tensors and plain values ({what});"
            " it was not run"
        ) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in many ways; none of them is a bug of ours
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def pytorch(purpose: str) -> Any:
    """The module torch, which is optional.

    Raises:
        UserError: it is not installed; says that `purpose` needs it.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(f"{purpose} needs PyTorch: pip install -r requirements-torch.txt") from None
