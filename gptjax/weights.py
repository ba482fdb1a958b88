"""Files of tensors: safetensors, and PyTorch's own, read without running anything in them."""

import errno
import importlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors

from gptjax import state_dict
from gptjax.errors import RunError, UserError, first_line

INDEX = "model.safetensors.index.json"


class SafetensorsFiles:
    """`state_dict.Tensors` of one or more .safetensors files, read piece by piece."""

    def __init__(self, files: Iterable[Path]):
        """UserError: a file is missing, truncated or damaged."""
        self._at: dict[str, Path] = {}
        self._names: list[str] = []
        for path in files:
            names = self._open(path).keys()
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                # The library keeps the last of two tensors of one name.
                _parse(file.read(size).decode(), path)
            self._names += names
            self._at |= dict.fromkeys(names, path)

    def _open(self, path: Path) -> Any:
        try:
            # Not mapped into memory: what is mapped and read counts as ours until it is closed.
            return safetensors.safe_open(path, framework="numpy", backend="pread")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}") from None

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._at[name]).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        try:
            return self._open(self._at[name]).get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
            # The last two: a type of number that numpy does not have.
            raise UserError(
                f"cannot read {name} from {self._at[name]}: {first_line(error)}"
            ) from None


class TorchTensors:
    """`state_dict.Tensors` of PyTorch tensors in memory; each is let go when it has been read."""

    def __init__(self, tensors: Any, where: str):
        """UserError: `tensors` is not a dict of tensors."""
        torch = pytorch()
        named = _items(tensors)
        if named is None or not all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in named.items()
        ):
            raise UserError(f"{where} does not hold named tensors")
        self._torch, self._tensors, self._where = torch, named, where

    def names(self) -> Iterable[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._tensors[name].shape)
        except RuntimeError:  # of a list of tensors that passes for one
            raise UserError(f"{self._where}: {name} is no plain array") from None

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors.pop(name).detach()
        try:
            # Strides of 0 make a tensor of any size out of one number.
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise UserError(f"{self._where}: {name} has fewer values than its shape says")
            # numpy has no bfloat16; float32 holds each of its values.
            tensor = tensor.float() if tensor.dtype == self._torch.bfloat16 else tensor
            return tensor.numpy()
        except (TypeError, RuntimeError):  # sparse, on another device, of an 8-bit type
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise UserError(f"{self._where}: {name} is no plain array ({kind})") from None


def _items(found: Any) -> dict[Any, Any] | None:
    """A plain dict, even of an OrderedDict whose own methods a file has overwritten."""
    return dict(dict.items(found)) if isinstance(found, dict) else None


def pytorch() -> Any:
    # Most users have no use for PyTorch, so it is imported only when its files are at hand.
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(
            "PyTorch's own files need PyTorch: pip install -r requirements-torch.txt"
        ) from None


def load_torch_file(path: Path) -> Any:
    """What torch.save wrote, if it is plain data: nothing in it is run.

    Raises:
        UserError: the file is damaged, or would import or run code.
    """
    torch = pytorch()
    try:
        with path.open("rb"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of guesses at what a damaged file may be
            # torch.save does not compress; a small file may hold terabytes of zeros.
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as parts:
                    if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                        raise ValueError("its parts are larger than the file")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asks = re.search(r"GLOBAL (\S+)", str(error))
        # The library's own words advise to run it all the same.
        what = f"it asks for {asks[1]}" if asks else "it is not what torch.save writes"
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not JSON: it is not UTF-8") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    """A JSON object, none of whose keys comes twice."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path} names {twice!r} twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def hugging_face_tensors(folder: Path) -> state_dict.Tensors:
    """The weights of a Hugging Face folder: model.safetensors or pytorch_model.bin, in one file or
    sharded.

    Raises:
        UserError: there are none, or they are damaged.
    """
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = folder / name
        if not path.is_file():
            continue
        files = _shards(path) if path.suffix == ".json" else [path]
        if "safetensors" in name:
            tensors: state_dict.Tensors = SafetensorsFiles(files)
        else:
            parts = [load_torch_file(file) for file in files]
            named = [items for part in parts if (items := _items(part)) is not None]
            if len(named) < len(parts) or sum(map(len, named)) > len(set().union(*named)):
                raise UserError(f"the parts of {path} do not hold distinct named tensors")
            tensors = TorchTensors({k: v for part in named for k, v in part.items()}, str(path))
        if path.suffix == ".json":
            listed, found = set(read_json(path)["weight_map"]), set(tensors.names())
            if listed != found:
                odd = ", ".join(sorted(listed ^ found)[: state_dict.NAMED])
                raise UserError(f"{path} and its files name different tensors: {odd}")
        return tensors
    raise UserError(
        f"{folder} holds no weights: expected model.safetensors, {INDEX} or pytorch_model.bin"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} is damaged: expected an object `weight_map` of file names")
    names = sorted(set(weight_map.values()))
    there = {path.name for path in index.parent.iterdir() if path.is_file()}
    for name in names:
        if name not in there:
            raise UserError(f"{index} names {name}, which is not a file beside it")
    return [index.parent / name for name in names]


def download(name: str) -> Path:
    """The folder with a model of the Hugging Face Hub, fetched unless it was before.

    Raises:
        UserError: there is no network, or no such model.
    """
    print(f"there is no file or folder {name}: asking the Hugging Face Hub for it")
    small = ["config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"]
    for weights in (["model*.safetensors*"], ["pytorch_model*.bin*"]):
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=small + weights))
        except Exception as error:  # of the HTTP library, the Hub's own, or the file system's
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise RunError(f"no room left on the disk for {name}") from None
            raise UserError(
                f"{name!r} is no file or folder here, and could not be fetched from the Hugging"
                f" Face Hub ({type(error).__name__}); check the name and the network, or download"
                " it elsewhere and name its folder"
            ) from None
        if any(folder.glob(weights[0])):
            break
    return folder
